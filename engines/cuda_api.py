"""The one door to ``cuda-python``: loading, and every call checked.

``cuda.bindings.runtime`` (package ``cuda-bindings``) and ``cuda.cudart`` (``cuda-python`` of
CUDA 12 before it) have the same functions: each returns its status first, then its values. A
status that is no success becomes an ``EngineError`` with CUDA's own name for it.
"""

from __future__ import annotations

import importlib
import operator
from typing import Any

from .errors import EngineError, MissingPackageError

# What ``import cuda.bindings.runtime`` gives, and its handles: it has no stubs.
CudaModule = Any
CudaHandle = Any

CUDA_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
"""Where the functions of the CUDA runtime may be, the newer first."""

_INSTALL = (
    '`pip install "cuda-python>=12.6,<13"` where the driver has CUDA 12 (JetPack 6), '
    '`pip install "cuda-python>=13"` where it has CUDA 13 (JetPack 7)'
)
_CURES = {
    "cudaErrorInsufficientDriver": (
        f"There is no NVIDIA driver here, or cuda-python is newer than it: {_INSTALL}."
    ),
    "cudaErrorNoDevice": "No GPU can be seen; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES.",
    "cudaErrorMemoryAllocation": (
        "The GPU has no memory left: end other programs that use it, or compile the bundle "
        "with a smaller recipe or --max-length."
    ),
}
_CURE = (
    "The GPU can only be used again by a new process; if this comes back, build the plans "
    "again with `mvlm build`, or run the ONNX files with provider 'cpu'."
)


def load_cuda() -> CudaRuntime:
    """Import the CUDA runtime's functions.

    Raises:
        MissingPackageError: neither module is installed.
    """
    problems = []
    for name in CUDA_MODULES:
        try:
            return CudaRuntime(importlib.import_module(name))
        except ImportError as error:
            problems.append(str(error))
    raise MissingPackageError(
        "Running TensorRT plans needs the Python package 'cuda-python', which cannot be "
        f"imported ({'; '.join(problems)}). Install it with {_INSTALL}."
    )


class CudaRuntime:
    """Functions of the CUDA runtime by name.

    Args:
        module: one of ``CUDA_MODULES``, imported.
    """

    def __init__(self, module: CudaModule) -> None:
        self._module = module

    def call(self, name: str, *arguments: object) -> Any:  # noqa: ANN401
        """Call a function.

        Returns:
            What it gives beside its status: nothing, a value, or a tuple of values.

        Raises:
            EngineError: the status is no success.
        """
        status, *values = getattr(self._module, name)(*arguments)
        if int(status) != 0:
            raise EngineError(self._describe(name, status))
        return values[0] if len(values) == 1 else tuple(values) or None

    def constant(self, path: str) -> Any:  # noqa: ANN401
        """A constant, or a member of an enumeration as ``enumeration.member``."""
        return operator.attrgetter(path)(self._module)

    def release(self, name: str, *handles: object) -> None:
        """Call a function that gives something back, at a time when no error can be raised.

        It fails where an earlier error, reported then, has ended the process's use of the GPU;
        what it would have given back goes with the process.
        """
        getattr(self._module, name)(*handles)

    def _describe(self, name: str, status: Any) -> str:  # noqa: ANN401
        texts = []
        for function in ("cudaGetErrorName", "cudaGetErrorString"):
            _, text = getattr(self._module, function)(status)
            texts.append(text.decode() if isinstance(text, bytes) else str(text))
        error, meaning = texts
        return f"CUDA: {name} failed with {error} ({meaning}). {_CURES.get(error, _CURE)}"
