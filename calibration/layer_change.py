"""One layer with other numbers, run alone: what it would have given, from what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from mvlm_export.passes.base import numpy_dtype
from mvlm_export.passes.deferred import Array, values_of

from .graph_pieces import GraphPieces, Piece, State
from .layer_rounding import (
    Candidate,
    Rounding,
    as_weight,
    input_steps,
    on_grid,
    round_layer,
)
from .layers import Layer


@dataclass(frozen=True, eq=False)
class LayerChange:
    """A changed layer.

    Attributes:
        output: name of the tensor it makes.
        piece: the layer alone, with the changed weight.
        steps: of the 8-bit grids of its operands, by name; none of those that stay in float.
    """

    output: str
    piece: Piece
    steps: dict[str, float]

    def run(self, state: State) -> Array:
        """Its output on one sample.

        Args:
            state: with the layer's inputs.
        """
        rounded = {name: on_grid(state[name], step) for name, step in self.steps.items()}
        return self.piece.run({**state, **rounded})[self.output]


def change_layer(
    layer: Layer,
    candidate: Candidate,
    states: Sequence[State],
    rounding: Rounding,
    scalable: bool,
    pieces: GraphPieces,
) -> LayerChange:
    """Round a layer by what reaches it.

    Args:
        states: each sample's, with the layer's inputs.
        scalable: whether the graph has a place for scales before it.
        pieces: of its graph.

    Raises:
        InputError: weights or activations that are not finite.
    """
    operands = layer.inputs
    values = [[state[t.name] for state in states] for t in operands]
    steps = input_steps(values, [t.name for t in operands]) if candidate.inputs else []
    weight = None
    if candidate.form is not None:
        rows = values[0] if values else []
        rounded = round_layer(layer, candidate.form, rows, rounding, scalable)
        weight = as_weight(layer, rounded.matrix())
    piece = pieces.open_node(_alone(layer, weight))
    names = [tensor.name for tensor in operands[: len(steps)]]
    return LayerChange(layer.node.outputs[0].name, piece, dict(zip(names, steps, strict=True)))


def _alone(layer: Layer, weight: Array | None) -> gs.Node:
    """A copy of a layer's node that shares no tensor with its graph."""
    node, old = layer.node, layer.weight
    inputs: list[gs.Tensor] = []
    for tensor in node.inputs:
        if weight is not None and old is not None and tensor.name == old.name:
            inputs.append(gs.Constant(tensor.name, weight))
        elif isinstance(tensor, gs.Constant):
            inputs.append(gs.Constant(tensor.name, values_of(tensor)))
        else:
            inputs.append(_variable(tensor))
    outputs = [_variable(tensor) for tensor in node.outputs]
    return gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs, domain=node.domain)


def _variable(tensor: gs.Tensor) -> gs.Variable:
    if tensor.is_empty():
        return gs.Variable.empty()
    shape = None if tensor.shape is None else list(tensor.shape)
    return gs.Variable(tensor.name, numpy_dtype(tensor), shape)
