"""The backends that can run a bundle, by name."""

from __future__ import annotations

from collections.abc import Callable

from .bundle import Bundle
from .errors import InputError
from .gpu_probe import probe_gpu
from .session import Backend, BackendOptions
from .targets import get_target

BackendFactory = Callable[[Bundle, BackendOptions], Backend]


def _open_onnxruntime(bundle: Bundle, options: BackendOptions) -> Backend:
    from .ort_session import OrtBackend

    return OrtBackend(bundle, options)


def _open_tensorrt(bundle: Bundle, options: BackendOptions) -> Backend:
    from .trt_session import TrtBackend

    return TrtBackend(bundle, options)


BACKENDS: dict[str, BackendFactory] = {
    "onnxruntime": _open_onnxruntime,
    "tensorrt": _open_tensorrt,
    "tensorrt_rtx": _open_tensorrt,
}
"""Backends by name, which is that of the runtime in a target's record."""

PLAN_BACKENDS = frozenset({"tensorrt", "tensorrt_rtx"})
"""Those that run a bundle's plans, on the GPU, where others run its ONNX files."""


def choose_backend(bundle: Bundle) -> str:
    """The runtime of the bundle's target where there are a GPU and plans for it; else ONNX's.

    Raises:
        BundleError: a build record cannot be read.
        InputError: the manifest's target is not known.
    """
    from .trt_session import has_plans

    target = get_target(bundle.manifest.target, bundle.manifest.jetpack)
    runs_plans = target.has_engines and has_plans(bundle, probe_gpu())
    return target.runtime if runs_plans else "onnxruntime"


def open_backend(bundle: Bundle, name: str, options: BackendOptions) -> Backend:
    """Open a backend of ``BACKENDS`` on a bundle.

    Raises:
        InputError: there is no such backend.
        MissingPackageError: its package is not installed.
        EngineError: it cannot run here.
    """
    factory = BACKENDS.get(name)
    if factory is None:
        raise InputError(
            f"There is no backend {name!r}; choose one of {', '.join(sorted(BACKENDS))}."
        )
    return factory(bundle, options)
