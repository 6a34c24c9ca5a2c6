"""What can be quantized in a graph: products by a weight, convolutions, attention, tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.base import numpy_dtype
from mvlm_export.passes.matching import constant_problem, describe, is_op

LayerKind = Literal["linear", "conv", "attention", "embedding"]
WEIGHT_SUFFIX = ".weight"


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that can be quantized.

    Attributes:
        name: of the weight in the checkpoint, without ``.weight`` and what rewrites added
            (``model.layers.0.self_attn.q_proj`` is the merged QKV projection); of the node,
            or of what it makes, where there is no weight.
        node: MatMul, Conv or Gather.
    """

    name: str
    kind: LayerKind
    node: gs.Node

    @property
    def weight(self) -> gs.Constant | None:
        """The constant operand; None of attention's products."""
        if self.kind == "attention":
            return None
        return self.node.inputs[0 if self.kind == "embedding" else 1]

    @property
    def inputs(self) -> list[gs.Tensor]:
        """The float operands that are computed."""
        if self.kind == "attention":
            return list(self.node.inputs[:2])
        return [] if self.kind == "embedding" else [self.node.inputs[0]]


def find_layers(graph: gs.Graph) -> list[Layer]:
    """Every layer, in the graph's order, each weight read by one node alone.

    Raises:
        PassError: two layers have one name, so that none can be told from the other.
    """
    layers = [layer for node in graph.nodes if (layer := _layer_of(graph, node)) is not None]
    named: dict[str, Layer] = {}
    for layer in layers:
        other = named.setdefault(layer.name, layer)
        if other is not layer:
            raise PassError(
                f"{describe(other.node)} and {describe(layer.node)} are both the layer "
                f"{layer.name!r}, and quantization goes by names. Name their weights apart."
            )
    return layers


def layer_name(weight: str) -> str:
    """A weight's name without ``.weight`` and what rewrites added to it."""
    return weight.split(WEIGHT_SUFFIX)[0]


def _layer_of(graph: gs.Graph, node: gs.Node) -> Layer | None:
    if is_op(node, "MatMul"):
        return _product(graph, node)
    if is_op(node, "Conv"):
        weight = node.inputs[1]
        if constant_problem(graph, weight, node) is None:
            return Layer(layer_name(weight.name), "conv", node)
    if is_op(node, "Gather"):
        table = node.inputs[0]
        wide = isinstance(table, gs.Constant) and _is_float_matrix(table)
        if wide and constant_problem(graph, table, node) is None and "embed" in table.name:
            return Layer(layer_name(table.name), "embedding", node)
    return None


def _product(graph: gs.Graph, node: gs.Node) -> Layer | None:
    left, right = node.inputs
    if not isinstance(left, gs.Variable):
        return None
    if isinstance(right, gs.Constant):
        plain = _is_float_matrix(right) and constant_problem(graph, right, node) is None
        return Layer(layer_name(right.name), "linear", node) if plain else None
    if len(left.shape or ()) >= 3:
        return Layer(node.name or node.outputs[0].name, "attention", node)
    return None


def _is_float_matrix(constant: gs.Constant) -> bool:
    return len(constant.shape) == 2 and np.dtype(numpy_dtype(constant)).kind == "f"
