"""Write quantized weights and activations into a graph, as Q/DQ that TensorRT fuses.

    W [K, N]  ->  DequantizeLinear(codes, scales)     int8: one scale a column, axis 1
                                                      int4: blocks of rows, axis 0
    x         ->  DequantizeLinear(QuantizeLinear(x, s), s)      one s for the whole tensor
    x W       ->  x DQ(codes) + blocksum(x) M         asymmetric int4: M = offsets [G, N]

Zero points are 0 throughout; those of 8-bit weights are written out, since ONNX Runtime needs
them to keep its sums from saturating (``session.x64quantprecision``). Activations are
quantized in front of the product that reads them, one pair a tensor however many products read
it; sums of the residual stream stay in float. Codes are read from disk when the graph is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.base import Pass, PassResult, Tally
from mvlm_export.passes.deferred import Array, DeferredValues
from mvlm_export.passes.editing import (
    consumers,
    fresh_name,
    insert_node,
    replace_tensor,
    set_opset,
)
from mvlm_export.passes.matching import describe

from .layers import Layer, find_layers
from .quantized_weight import StoredWeight
from .weight_grids import WeightFormat

BLOCKED_OPSET = 21
"""ONNX has int4 and blocks from this opset on."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        weight: its weight on the grid; None leaves it in float.
        input_scales: of each computed operand, one number for the whole tensor; empty leaves
            them in float.
    """

    weight: StoredWeight | None = None
    input_scales: tuple[float, ...] = ()


Plan = Mapping[str, LayerPlan]
"""By the name of the layer; see :class:`.layers.Layer`."""


class WriteQuantization(Pass):
    """Q/DQ for every layer of a plan; a layer that the graph lacks is an error.

    Args:
        plan: what becomes of each layer.
    """

    name = "write-quantization"
    summary = "weights and activations on integer grids, as Q/DQ"
    opsets = range(20, 25)
    rounding = "integers"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        layers = {layer.name: layer for layer in find_layers(graph)}
        missing = sorted(set(self.plan) - set(layers))
        if missing:
            raise PassError(
                f"the graph has no layers {', '.join(missing[:5])} (and {len(missing)} in "
                "all), which were to be quantized"
            )
        pairs = _Pairs(graph)
        for name, part in self.plan.items():
            layer = layers[name]
            problem = _problem(layer, part)
            if problem is not None:
                tally.refuse(layer.node, problem)
                continue
            if part.input_scales:
                pairs.put(layer, part.input_scales)
            if part.weight is not None:
                _WRITERS[layer.kind](graph, layer, part.weight)
            tally.rewrote()
        if any(p.weight is not None and p.weight.form.bits == 4 for p in self.plan.values()):
            set_opset(graph, max(graph.opset, BLOCKED_OPSET))
        return tally.result()


def _problem(layer: Layer, part: LayerPlan) -> str | None:
    if part.input_scales and len(part.input_scales) != len(layer.inputs):
        return f"it has {len(layer.inputs)} computed operands, not {len(part.input_scales)}"
    weight = part.weight
    if weight is None:
        return None
    if layer.weight is None or matrix_shape(layer) != weight.shape:
        shape = None if layer.weight is None else matrix_shape(layer)
        return f"its weight is {shape}, and what was quantized is {weight.shape}"
    return form_problem(layer, weight.form)


def form_problem(layer: Layer, form: WeightFormat) -> str | None:
    """Why a layer's weight cannot be written in a form; None if it can."""
    if layer.kind == "conv" and form.bits != 8:
        return "convolutions take 8-bit weights alone"
    if form.symmetric:
        return None
    return "linear layers alone take offsets" if layer.kind != "linear" else None


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """(K, N) of a layer's weight as :func:`weight_matrix` gives it."""
    assert layer.weight is not None
    shape = tuple(layer.weight.shape)
    if layer.kind == "linear":
        return shape[0], shape[1]
    return int(np.prod(shape[1:])), shape[0]


def weight_matrix(layer: Layer, values: Array) -> Array:
    """A layer's weight as a matrix [K, N] whose columns have a scale of their own.

    A convolution's [O, I, h, w] becomes [I h w, O], an embedding's [V, D] becomes [D, V].
    """
    if layer.kind == "linear":
        return values
    return np.ascontiguousarray(values.reshape(len(values), -1).T)


class _Pairs:
    """Q/DQ pairs in front of quantized readers, one for each tensor and scale."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int, float], gs.Tensor] = {}

    def put(self, layer: Layer, scales: tuple[float, ...]) -> None:
        for tensor, scale in zip(layer.inputs, scales, strict=True):
            replaced = self._pair(tensor, scale)
            for index, operand in enumerate(layer.node.inputs):
                if operand is tensor:
                    layer.node.inputs[index] = replaced

    def _pair(self, tensor: gs.Tensor, scale: float) -> gs.Tensor:
        if (id(tensor), scale) not in self._made:
            graph, stem = self._graph, tensor.name
            step = gs.Constant(fresh_name(graph, f"{stem}.scale"), np.array(scale, np.float32))
            zero = gs.Constant(fresh_name(graph, f"{stem}.zero"), np.array(0, np.int8))
            codes = insert_node(
                graph,
                "QuantizeLinear",
                [tensor, step, zero],
                tensor,
                dtype=np.dtype(np.int8),
                stem=f"{stem}.int8",
            )
            self._made[id(tensor), scale] = insert_node(
                graph, "DequantizeLinear", [codes, step, zero], tensor, stem=f"{stem}.rounded"
            )
        return self._made[id(tensor), scale]


def _write_linear(graph: gs.Graph, layer: Layer, weight: StoredWeight) -> None:
    _replace_weight(graph, layer, weight, lambda codes: codes, lambda table: table)
    if not weight.form.symmetric:
        _add_correction(graph, layer, weight)


def _write_conv(graph: gs.Graph, layer: Layer, weight: StoredWeight) -> None:
    shape = tuple(layer.node.inputs[1].shape)
    _replace_weight(graph, layer, weight, lambda codes: codes.T.reshape(shape), None, axis=0)


def _write_embedding(graph: gs.Graph, layer: Layer, weight: StoredWeight) -> None:
    _replace_weight(graph, layer, weight, np.transpose, np.transpose, axis=1)


_WRITERS: dict[str, Callable[[gs.Graph, Layer, StoredWeight], None]] = {
    "linear": _write_linear,
    "conv": _write_conv,
    "embedding": _write_embedding,
}


def _replace_weight(
    graph: gs.Graph,
    layer: Layer,
    weight: StoredWeight,
    place_codes: Callable[[Array], Array],
    place_scales: Callable[[Array], Array] | None,
    axis: int = 0,
) -> None:
    """Let a layer read DequantizeLinear; ``axis`` is that of blocks, or of the channels."""
    old = layer.weight
    assert old is not None
    blocked = weight.form.group_size is not None
    dtype = np.dtype(ml_dtypes.int4 if weight.form.bits == 4 else np.int8)
    codes = _stored(
        fresh_name(graph, f"{old.name}.int{weight.form.bits}"),
        list(old.shape),
        dtype,
        lambda: place_codes(weight.codes()).astype(dtype),
    )
    table = _scales_of(weight, place_scales if blocked else None)
    scales = gs.Constant(fresh_name(graph, f"{old.name}.scales"), table)
    operands = [codes, scales]
    if weight.form.bits == 8:
        name = fresh_name(graph, f"{old.name}.zeros")
        operands.append(gs.Constant(name, np.zeros(table.shape, np.int8)))
    attrs = (
        {"axis": axis, "block_size": weight.form.group_size}
        if blocked
        else {"axis": 1 if layer.kind == "linear" else 0}
    )
    made = insert_node(
        graph,
        "DequantizeLinear",
        operands,
        shape=list(old.shape),
        dtype=np.dtype(np.float32),
        attrs=attrs,
        stem=f"{old.name}.dequantized",
    )
    layer.node.inputs[0 if layer.kind == "embedding" else 1] = made


def _scales_of(weight: StoredWeight, place: Callable[[Array], Array] | None) -> DeferredValues:
    """Scales [G, N] laid out by ``place``; a vector [N] where there are no blocks."""
    rows, columns = weight.shape
    if place is None:
        return DeferredValues([columns], np.float32, lambda: weight.scales()[0])
    shape = place(np.empty((weight.form.groups(rows), columns), np.int8)).shape
    return DeferredValues(
        shape, np.float32, lambda: np.ascontiguousarray(place(weight.scales()))
    )


def _stored(
    name: str, shape: list[int], dtype: np.dtype[Any], read: Callable[[], Array]
) -> gs.Constant:
    return gs.Constant(name, DeferredValues(shape, dtype, read))


def _add_correction(graph: gs.Graph, layer: Layer, weight: StoredWeight) -> None:
    """Add ``blocksum(x) @ offsets`` to a product."""
    node, size = layer.node, weight.form.group_size
    assert size is not None
    x, product = node.inputs[0], node.outputs[0]
    rows, columns = weight.shape
    if x.shape is None:
        raise PassError(f"the shape of {x.name!r} before {describe(node)} is not known")
    lead, groups = list(x.shape[:-1]), weight.form.groups(rows)
    stem = product.name
    if rows % size:  # zeros fill the last block up
        ends = np.array([*([0] * (2 * len(lead) + 1)), groups * size - rows], np.int64)
        shape = [*lead, groups * size]
        x = insert_node(graph, "Pad", [x, ends], x, shape=shape, stem=f"{stem}.filled")
    split = np.array([*([0] * len(lead)), groups, size], np.int64)
    blocks = insert_node(
        graph, "Reshape", [x, split], x, shape=[*lead, groups, size], stem=f"{stem}.blocks"
    )
    sums = insert_node(
        graph,
        "ReduceSum",
        [blocks, np.array([-1], np.int64)],
        x,
        shape=[*lead, groups],
        attrs={"keepdims": 0},
        stem=f"{stem}.blocksums",
    )
    offsets = _stored(
        fresh_name(graph, f"{stem}.offsets"),
        [groups, columns],
        np.dtype(np.float32),
        weight.offsets,
    )
    correction = insert_node(
        graph, "MatMul", [sums, offsets], product, stem=f"{stem}.correction"
    )
    readers = consumers(product)
    total = insert_node(graph, "Add", [correction], product, stem=f"{stem}.corrected")
    if readers or any(output is product for output in graph.outputs):
        replace_tensor(graph, product, total)
    total.inputs[0].inputs.insert(0, product)
