"""What the installed ONNX Runtime can run: Python 3.10's newest is 1.23."""

import onnxruntime
import pytest

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.ort_api import require_int8_cache


def _has_int8_cache() -> bool:
    try:
        require_int8_cache(onnxruntime)
    except EngineError:
        return False
    return True


NEEDS_INT8_CACHE = pytest.mark.skipif(
    not _has_int8_cache(), reason=f"ONNX Runtime {onnxruntime.__version__} has no int8 cache"
)
