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


INT8_CACHE_SINCE = (1, 27)
"""First ONNX Runtime whose CPU keeps keys and values in 8 bits."""

TENSOR_SCATTER_SINCE = (1, 25)
"""First ONNX Runtime whose CPU has TensorScatter of opset 24."""

FLOAT16_ROUNDS_SINCE = (1, 30)
"""First ONNX Runtime whose CPU rounds where it quantizes float16; older ones truncate, so that
8-bit activations are others (microsoft/onnxruntime, pull request 32452)."""

_WITHOUT = (
    "leave ONNX Runtime out: compile with --no-parity and without --verify-passes, and run "
    "the plans on the device"
)


def require_int8_cache(ort: Any) -> None:  # noqa: ANN401
    """Check that this ONNX Runtime runs decoders with an int8 cache.

    Raises:
        EngineError: it is too old.
    """
    _require(
        ort,
        INT8_CACHE_SINCE,
        "A KV cache of int8",
        "compile the bundle without --kv-cache-dtype",
    )


def require_tensor_scatter(ort: Any) -> None:  # noqa: ANN401
    """Check that this ONNX Runtime runs decoders whose cache TensorScatter writes.

    Raises:
        EngineError: it is too old.
    """
    _require(
        ort,
        TENSOR_SCATTER_SINCE,
        "A decoder for JetPack 7, whose cache TensorScatter writes,",
        _WITHOUT,
    )


def require_float16_rounding(ort: Any) -> None:  # noqa: ANN401
    """Check that this ONNX Runtime's CPU rounds where it quantizes float16 activations.

    Raises:
        EngineError: it is too old.
    """
    _require(
        ort,
        FLOAT16_ROUNDS_SINCE,
        "A float16 graph with 8-bit activations, which older CPU kernels truncate where "
        "they should round,",
        _WITHOUT,
    )


def _require(ort: Any, since: tuple[int, int], what: str, otherwise: str) -> None:  # noqa: ANN401
    found = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if found < since:
        raise EngineError(
            f"{what} needs ONNX Runtime {since[0]}.{since[1]} or newer, which needs Python "
            f"3.11, and {ort.__version__} is installed. Update it, or {otherwise}."
        )


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
