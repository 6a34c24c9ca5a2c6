"""The backends that can run a bundle, by name."""

from __future__ import annotations

from collections.abc import Callable

from .bundle import Bundle
from .errors import InputError
from .session import Backend, BackendOptions

BackendFactory = Callable[[Bundle, BackendOptions], Backend]


def _open_onnxruntime(bundle: Bundle, options: BackendOptions) -> Backend:
    from .ort_session import OrtBackend

    return OrtBackend(bundle, options)


BACKENDS: dict[str, BackendFactory] = {"onnxruntime": _open_onnxruntime}
"""Backends by name; a new one is one more line."""


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
