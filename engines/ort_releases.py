"""What older releases of ONNX Runtime lack or get wrong: none runs a graph that it cannot."""

from __future__ import annotations

from typing import Any

from .errors import EngineError
from .manifest import GraphSpec, Manifest
from .targets import get_target

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


def require_release_for(ort: Any, manifest: Manifest, provider: str) -> None:  # noqa: ANN401
    """Check that this ONNX Runtime runs a bundle's graphs, and rightly.

    Args:
        provider: ``cpu`` or ``cuda``.

    Raises:
        InputError: the manifest's target is not known.
        EngineError: it is too old.
    """
    if manifest.cache_scales:
        require_int8_cache(ort)
    target = get_target(manifest.target, manifest.jetpack)
    if manifest.kv_form == "fixed" and target.scatters_cache:
        require_tensor_scatter(ort)
    if provider == "cpu" and any(map(_quantizes_float16, manifest.graphs.values())):
        require_float16_rounding(ort)


def _quantizes_float16(graph: GraphSpec) -> bool:
    """Activations, that is: those alone are factors of products that may saturate."""
    return graph.dtype == "float16" and graph.may_saturate


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
