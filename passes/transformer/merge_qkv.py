"""Make one layer of the query, key and value projections.

The three read the same hidden state, so that one MatMul with [W_q | W_k | W_v] and a Split do
their work (see :mod:`.parallel_matmuls`). Which is which is read off the attention behind:
queries are the left operand of the scores, keys the right one, values the right operand of the
product with the probabilities. With grouped queries W_k and W_v are narrower.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from .attention import find_attentions, layers_above
from .parallel_matmuls import Merger


class MergeQkv(Pass):
    """Three projections of one tensor to one MatMul and a Split in q, k, v order.

    Run it before attention is lowered to an operator of its own.
    """

    name = "merge-qkv"
    summary = "query, key and value projections become one MatMul"

    def run(self, graph: gs.Graph) -> PassResult:
        tally, merger = Tally(), Merger(graph, "with_kv")
        for mix, projections in list(_find_projections(graph)):
            problem = merger.problem(projections)
            if problem is None:
                merger.merge(projections)
                tally.rewrote()
            else:
                tally.refuse(mix, problem)
        return tally.result()


def _find_projections(graph: gs.Graph) -> Iterator[tuple[gs.Node, list[gs.Node]]]:
    for attention in find_attentions(graph):
        roots = [layers_above(t) for t in (attention.query, attention.key, attention.value)]
        if any(len(nodes) != 1 for nodes in roots):
            continue
        projections = [nodes[0] for nodes in roots]
        if len({id(node) for node in projections}) == 3:
            yield attention.mix, projections
