"""Merge nodes that compute the same: common subexpressions.

Two pure nodes with the same operator, attributes and inputs give the same outputs, so the
readers of the second may read the first. Going through the graph in order, whole equal chains
(Shape, Gather, Unsqueeze, Cast and the like, which each use of a dynamic axis leaves behind)
fold onto the first of them. Operands of Add, Mul and their kind may stand in either order:
floating-point sums and products of two numbers do not depend on it.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import SMALL, is_deferred, values_of
from ..editing import is_graph_input, is_graph_output, replace_tensor, unlink
from ..matching import COMMUTATIVE, describe
from .bypass import take_type
from .op_kinds import is_pure


class MergeEqualNodes(Pass):
    """Equal nodes to one."""

    name = "merge-equal-nodes"
    summary = "nodes that compute the same from the same become one"

    def run(self, graph: gs.Graph) -> PassResult:
        graph.toposort()
        tally = Tally()
        seen: dict[Hashable, gs.Node] = {}
        for node in list(graph.nodes):
            if not is_pure(node):
                continue
            first = seen.setdefault(_signature(graph, node), node)
            if first is node:
                continue
            problem = _problem(graph, node, first)
            if problem is None:
                _merge(graph, node, first)
                tally.rewrote()
            else:
                tally.refuse(node, problem)
        return tally.result()


def _signature(graph: gs.Graph, node: gs.Node) -> Hashable:
    attrs = tuple(sorted((key, _plain(value)) for key, value in node.attrs.items()))
    inputs: tuple[Hashable, ...] = tuple(_source(graph, tensor) for tensor in node.inputs)
    if node.op in COMMUTATIVE and len(inputs) == 2:
        inputs = tuple(sorted(inputs, key=str))
    outputs = tuple(tensor.is_empty() for tensor in node.outputs)
    return node.op, attrs, inputs, outputs


def _source(graph: gs.Graph, tensor: gs.Tensor) -> Hashable:
    """Which tensor it is; a small constant is what it holds."""
    if tensor.is_empty():
        return ""
    small = isinstance(tensor, gs.Constant) and not is_deferred(tensor)
    if small and tensor._values.nbytes <= SMALL and not is_graph_input(graph, tensor):
        return _plain(tensor)
    return id(tensor)


def _plain(value: object) -> str:
    if isinstance(value, gs.Constant):
        value = values_of(value)
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    return repr(list(value) if isinstance(value, tuple) else value)


def _problem(graph: gs.Graph, node: gs.Node, first: gs.Node) -> str | None:
    for old, new in zip(node.outputs, first.outputs, strict=True):
        if is_graph_output(graph, old) and is_graph_output(graph, new):
            return (
                f"{old.name!r} equals {new.name!r} of {describe(first)}, but both are outputs "
                "of the graph"
            )
    return None


def _merge(graph: gs.Graph, node: gs.Node, first: gs.Node) -> None:
    for old, new in zip(node.outputs, first.outputs, strict=True):
        if not old.is_empty():
            take_type(graph, new, old)
            replace_tensor(graph, old, new)
    unlink(node)
