"""What the installed ONNX Runtime can run: Python 3.10's newest is 1.23."""

from __future__ import annotations

import onnxruntime
import pytest

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.ort_releases import (
    require_float16_rounding,
    require_int8_cache,
    require_tensor_scatter,
)


def _passes(require) -> bool:
    try:
        require(onnxruntime)
    except EngineError:
        return False
    return True


NEEDS_INT8_CACHE = pytest.mark.skipif(
    not _passes(require_int8_cache),
    reason=f"ONNX Runtime {onnxruntime.__version__} has no int8 cache",
)

HAS_ALL = all(map(_passes, (require_tensor_scatter, require_float16_rounding)))
"""Whether every bundle for a Jetson runs that has no int8 cache."""

_LACKS = (
    "official support for domain ai.onnx is till opset 23",
    "Failed to find kernel for TensorScatter",
    "whose cache TensorScatter writes, needs ONNX Runtime",
    "truncate where they should round, needs ONNX Runtime",
)


def is_too_old_for(error: BaseException | None) -> bool:
    """Whether an error, ours or ONNX Runtime's, says that it lacks one of these."""
    while error is not None:
        if any(words in str(error) for words in _LACKS):
            return True
        error = error.__cause__ or error.__context__
    return False
