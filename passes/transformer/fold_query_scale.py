"""Fold attention's scale into the query projection.

Between the projection and the scale stand only maps that are linear and homogeneous in the
query (biases apart, which are scaled too): reshapes, transposes, and the rotary embedding,

    c (q cos + rotate(q) sin) = (c q) cos + rotate(c q) sin,    c q = x (c W) + c b.

So c moves into W and b, exactly, when nothing between reads the query unscaled. One pass over
the queries is saved in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, values_of
from ..editing import (
    consumers,
    is_graph_input,
    is_graph_output,
    producer,
    replace_tensor,
    unlink,
)
from ..matching import describe, is_foreign, is_op
from .attention import Attention, find_attentions, is_move
from .linear_layers import is_matmul, rewrite_constant, weight_problem


class FoldQueryScale(Pass):
    """``c * rotate(x @ W + b)`` in front of the scores to ``rotate(x @ cW + cb)``."""

    name = "fold-query-scale"
    summary = "attention's scale goes into the query projection"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        refused: set[int] = set()
        for attention in find_attentions(graph):
            # Two scales in a row are folded one by one.
            while (found := _find_scale(attention)) and id(found[0]) not in refused:
                problem = _fold(graph, *found)
                if problem is None:
                    tally.rewrote()
                else:
                    tally.refuse(found[0], problem)
                    refused.add(id(found[0]))
        return tally.result()


def _find_scale(attention: Attention) -> tuple[gs.Node, gs.Tensor] | None:
    """The product with one number that ends as the left operand of the scores."""
    node = producer(attention.query)
    while node is not None and is_move(node):
        node = producer(node.inputs[0])
    if not is_op(node, "Mul"):
        return None
    scales = (t for t in node.inputs if _is_scalar(t) and not _is_one(t))
    scale = next(scales, None)
    return None if scale is None else (node, scale)


def _fold(graph: gs.Graph, multiply: gs.Node, scale: gs.Tensor) -> str | None:
    """Scale the projection instead; why not, if it cannot be."""
    query = multiply.inputs[1 if multiply.inputs[0] is scale else 0]
    cone = _Cone(multiply)
    problem = _scale_problem(graph, scale, query) or cone.grow(graph, query)
    problem = problem or cone.leak(graph)
    if problem is None:
        cone.fold(graph, scale)
        replace_tensor(graph, multiply.outputs[0], query)
        unlink(multiply)
    return problem


def _is_scalar(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and all(axis == 1 for axis in tensor.shape)


def _is_one(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and bool((values_of(tensor) == 1).all())


def _scale_problem(graph: gs.Graph, scale: gs.Tensor, query: gs.Tensor) -> str | None:
    if is_graph_input(graph, scale):
        return f"the scale {scale.name!r} is an input of the graph"
    made = producer(scale)
    if made is not None:
        return f"the scale {scale.name!r} is computed by {describe(made)}"
    if len(scale.shape) > len(query.shape or ()):
        return f"the scale {scale.name!r} adds axes to the query {query.name!r}"
    return None


@dataclass
class _Cone:
    """Everything between a scale and the projections it can move to.

    Attributes:
        scale: the node that multiplies.
        nodes: whose results would be scaled.
        constants: (node, constant): weights and biases that take the scale.
    """

    scale: gs.Node
    nodes: dict[int, gs.Node] = field(default_factory=dict)
    constants: list[tuple[gs.Node, gs.Constant]] = field(default_factory=list)

    def grow(self, graph: gs.Graph, tensor: gs.Tensor) -> str | None:
        """Take in what makes ``tensor``, up to the projections; why not, if it cannot be."""
        node = producer(tensor)
        if node is None:
            kind = "an input of the graph" if is_graph_input(graph, tensor) else "a constant"
            return f"the query depends on {tensor.name!r}, {kind}"
        if id(node) in self.nodes:
            return None
        self.nodes[id(node)] = node
        if is_matmul(node):
            return self._project(graph, node)
        if is_foreign(node):
            return f"{describe(node)} is not known to be linear"
        if is_move(node) or node.op in ("Neg", "Div"):
            return self.grow(graph, node.inputs[0])
        if node.op == "Mul":
            return self._multiply(graph, node)
        if node.op in ("Add", "Sub", "Concat"):
            return self._combine(graph, node)
        return f"{describe(node)} stands between the projection and the scale"

    def _project(self, graph: gs.Graph, matmul: gs.Node) -> str | None:
        problem = weight_problem(graph, matmul)
        if problem is None:
            self.constants.append((matmul, matmul.inputs[1]))
        return problem

    def _multiply(self, graph: gs.Graph, node: gs.Node) -> str | None:
        """One factor takes the scale: the first that comes from projections alone."""
        problem = None
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                continue
            kept = dict(self.nodes), list(self.constants)
            found = self.grow(graph, tensor)
            if found is None:
                return None
            self.nodes, self.constants = kept
            problem = problem or found
        return problem or f"{describe(node)} multiplies constants"

    def _combine(self, graph: gs.Graph, node: gs.Node) -> str | None:
        """Every operand takes the scale."""
        if all(isinstance(tensor, gs.Constant) for tensor in node.inputs):
            return f"{describe(node)} combines constants"
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and not is_graph_input(graph, tensor):
                self.constants.append((node, tensor))
                continue
            problem = self.grow(graph, tensor)
            if problem is not None:
                return problem
        return None

    def leak(self, graph: gs.Graph) -> str | None:
        """Why the scale would reach too far or come twice; None if it does not."""
        for node in self.nodes.values():
            scaled = sum(self._holds(tensor) for tensor in node.inputs)
            allowed = {"MatMul": 0, "Mul": 1, "Div": 1}.get(node.op, scaled)
            if scaled > allowed:
                return f"{describe(node)} takes the query twice"
            for tensor in node.outputs:
                if is_graph_output(graph, tensor):
                    return f"{tensor.name!r} is also an output of the graph"
                for reader in consumers(tensor):
                    inside = reader is self.scale or id(reader) in self.nodes
                    if not inside and not is_op(reader, "Shape"):
                        return f"{tensor.name!r} is also read by {describe(reader)}"
        return None

    def _holds(self, tensor: gs.Tensor) -> bool:
        node = producer(tensor)
        return node is not None and id(node) in self.nodes

    def fold(self, graph: gs.Graph, scale: gs.Constant) -> None:
        """Scale the weights and biases."""
        for node, constant in self.constants:
            rewrite_constant(graph, node, constant, "scaled", _times, others=[scale])


def _times(values: Array, scale: Array) -> Array:
    scaled: Array = values * scale.reshape(())
    return scaled
