"""ONNX Runtime, imported when first needed, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import EngineError, MissingPackageError

LOG_FATAL_ONLY = 4
"""Severity level: what goes wrong is raised, with its text, and need not be logged as well."""


def import_onnxruntime(extra: str = "cpu") -> Any:  # noqa: ANN401
    """The package.

    Args:
        extra: which of this package's extras brings the right one, ``cpu`` or ``gpu``.

    Raises:
        MissingPackageError: it is not installed, or does not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            f"Running graphs needs ONNX Runtime ({error}); install it with "
            f"`pip install 'mvlm-export[{extra}]'`."
        ) from error
    return onnxruntime


def session_options(
    ort: Any,  # noqa: ANN401
    threads: int | None = None,
    may_saturate: bool = True,
) -> Any:  # noqa: ANN401
    """Options of a session whose numbers are right on every CPU.

    Products of 8 bits are summed in pairs of 16 bits on x86 CPUs without VNNI, where they
    saturate; ``session.x64quantprecision`` keeps them from it there, and does nothing
    elsewhere. It reads all weights for that, so graphs that cannot saturate are loaded
    without it.

    Args:
        threads: for one operator; None means ONNX Runtime's default.
        may_saturate: of the graph's ``GraphSpec``.
    """
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    if may_saturate:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@contextmanager
def ort_errors(ort: Any, graph: str, doing: str) -> Iterator[None]:  # noqa: ANN401
    """Turn what ONNX Runtime raises (its own classes know no common base) into EngineError."""
    try:
        yield
    except _exceptions_of(ort) as error:
        raise EngineError(
            f"ONNX Runtime cannot {doing} the graph {graph!r}: {error} Copy the bundle "
            "again or compile it again; an ONNX Runtime older than 1.20 must be updated."
        ) from error


def _exceptions_of(ort: Any) -> tuple[type[Exception], ...]:  # noqa: ANN401
    found = vars(ort.capi.onnxruntime_pybind11_state).values()
    own = (kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))
    return (RuntimeError, ValueError, *own)
