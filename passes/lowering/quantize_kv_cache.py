"""The fixed cache of ONNX Runtime in 8 bits, one scale for the keys of a layer and one for its
values.

    past_key, past_value, present_key, present_value: float -> int8
    GroupQueryAttention<k_quant_type = v_quant_type = "PER_TENSOR", kv_cache_bit_width = 8>
        (..., k_scale, v_scale)

A row x is stored as the codes round(x / scale) of -128 to 127; attention works with code *
scale. Keys are stored rotated. The cache takes a quarter of the bytes, all of which every step
reads, and the operator's loop over rows is faster (docs/performance.md).

Semantics: ContribOperators.md of ONNX Runtime, whose CPU has it from 1.27 on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.targets import ORT_DOMAIN

from ..base import Pass, PassResult, Tally, Tensors, numpy_dtype
from ..deferred import Array
from ..editing import consumers, fresh_name, producer

BITS = 8
_LOWEST, _HIGHEST = -128, 127
_SCALES = 12
"""Place of ``k_scale`` among the operator's inputs; ``v_scale`` follows."""

_INT8 = np.dtype(np.int8)


class QuantizeKvCache(Pass):
    """Float caches of ``GroupQueryAttention`` to int8.

    Args:
        scales: what a code is worth, by ``present.{n}.key`` and ``present.{n}.value``.
    """

    name = "quantize-kv-cache"
    summary = "keys and values are kept in 8 bits"
    opsets = range(18, 25)
    rounding = "integers"

    def __init__(self, scales: Mapping[str, float]) -> None:
        self.scales = scales

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for node in graph.nodes:
            if node.op != "GroupQueryAttention" or node.domain != ORT_DOMAIN:
                continue
            problem = self._problem(graph, node)
            if problem is None:
                self._quantize(graph, node)
                tally.rewrote()
            else:
                tally.refuse(node, problem)
        return tally.result()

    def _problem(self, graph: gs.Graph, node: gs.Node) -> str | None:
        if len(node.inputs) > _SCALES or len(node.outputs) < 3:
            return "it has no cache of its own, or one that is quantized already"
        for past, present in _caches(node):
            if present.name not in self.scales:
                return f"there is no scale for {present.name!r}"
            if np.dtype(numpy_dtype(past)).kind != "f":
                return f"{past.name!r} is {past.dtype}"
            if producer(past) is not None or len(consumers(past)) != 1:
                return f"{past.name!r} is not this operator's alone"
            if not any(present is output for output in graph.outputs) or consumers(present):
                return f"{present.name!r} is read by others, or is no output of the graph"
        return None

    def _quantize(self, graph: gs.Graph, node: gs.Node) -> None:
        scales = []
        for past, present in _caches(node):
            past.dtype = present.dtype = _INT8
            name = fresh_name(graph, f"{present.name}.scale")
            scales.append(gs.Constant(name, np.array([self.scales[present.name]], np.float32)))
        missing = _SCALES - len(node.inputs)
        node.inputs.extend([gs.Variable.empty() for _ in range(missing)])
        node.inputs.extend(scales)
        kind = "PER_TENSOR"
        node.attrs |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": BITS}

    def feeds_before(self, feeds: Tensors) -> Tensors:
        """Each cache in the graph's floats, which its other inputs have."""
        dtype = next(value.dtype for value in feeds.values() if value.dtype.kind == "f")
        return {
            name: dequantize_rows(value, self._scale(name)).astype(dtype)
            if value.dtype == _INT8
            else value
            for name, value in feeds.items()
        }

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """Each cache in codes."""
        quantized = {name for name, value in feeds.items() if value.dtype == _INT8}
        return {
            name: quantize_rows(value, self.scales[name])
            if name.replace("present", "past_key_values", 1) in quantized
            else value
            for name, value in outputs.items()
        }

    def _scale(self, past: str) -> float:
        return self.scales[past.replace("past_key_values", "present", 1)]


def _caches(node: gs.Node) -> Iterator[tuple[gs.Variable, gs.Variable]]:
    """(past, present) of the keys, then of the values."""
    yield node.inputs[3], node.outputs[1]
    yield node.inputs[4], node.outputs[2]


def quantize_rows(rows: Array, scale: float) -> Array:
    """Codes int8 of float rows of any shape; what lies beyond the grid is put on its end."""
    steps = np.rint(rows.astype(np.float32) / np.float32(scale))
    codes: Array = np.clip(steps, _LOWEST, _HIGHEST).astype(np.int8)
    return codes


def dequantize_rows(codes: Array, scale: float) -> Array:
    """float32 rows that int8 codes stand for."""
    rows: Array = codes.astype(np.float32) * np.float32(scale)
    return rows
