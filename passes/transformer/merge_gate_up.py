"""Make one layer of a gated MLP's two projections.

    act(x W_g) * (x W_u):    x W_g, x W_u = split(x [W_g | W_u])

with act = SiLU written out (z * sigmoid(z)), or Swish, Gelu or Relu as operators. (GLU
variants: arXiv 2002.05202.) See :mod:`.parallel_matmuls`.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..editing import producer
from ..matching import any_, find_matches, is_op, one_of, op
from .linear_layers import bias_add, is_matmul
from .parallel_matmuls import Merger

_SILU = op("Mul", any_("gate"), op("Sigmoid", any_("gate")))
_ACTIVATION = one_of(_SILU, op(("Swish", "Gelu", "Relu"), any_("gate")))
_PATTERN = op("Mul", _ACTIVATION, any_("up"))


class MergeGateUp(Pass):
    """Gate and up projections to one MatMul and a Split in gate, up order."""

    name = "merge-gate-up"
    summary = "gate and up projections become one MatMul"

    def run(self, graph: gs.Graph) -> PassResult:
        tally, merger = Tally(), Merger(graph, "with_up")
        for product, gate, up in list(_find_projections(graph)):
            problem = merger.problem([gate, up])
            if problem is None:
                merger.merge([gate, up])
                tally.rewrote()
            else:
                tally.refuse(product, problem)
        return tally.result()


def _find_projections(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Node, gs.Node]]:
    for match in find_matches(graph, _PATTERN):
        gate, up = (_layer(graph, match[name]) for name in ("gate", "up"))
        if gate is None or up is None or gate is up:
            continue
        if gate.inputs[0] is up.inputs[0]:
            yield match.nodes[0], gate, up


def _layer(graph: gs.Graph, result: gs.Tensor) -> gs.Node | None:
    """The MatMul that gives ``result``, with a bias or without."""
    node = producer(result)
    if is_op(node, "Add"):
        for tensor in node.inputs:
            matmul = producer(tensor)
            if matmul is not None and is_matmul(matmul) and bias_add(graph, matmul) is node:
                return matmul
    return node if is_matmul(node) else None
