"""Remove nodes that no output of the graph depends on.

A node is alive if a path leads from it to an output. The others are unlinked; constants that
only they read go with them. Outputs of a living node that nobody reads, such as one part of a
Split, stay: they are part of what the operator is.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult
from ..editing import unlink


class RemoveDeadCode(Pass):
    """Take out what reaches no output."""

    name = "remove-dead-code"
    summary = "nodes and weights that no output depends on are dropped"

    def run(self, graph: gs.Graph) -> PassResult:
        alive = _living(graph)
        dead = [node for node in graph.nodes if id(node) not in alive]
        for node in dead:
            unlink(node)
        graph.nodes = [node for node in graph.nodes if id(node) in alive]
        return PassResult(len(dead), len(dead))


def _living(graph: gs.Graph) -> set[int]:
    """Ids of the nodes that an output depends on."""
    alive: set[int] = set()
    pending: list[gs.Tensor] = list(graph.outputs)
    while pending:
        for node in pending.pop().inputs:
            if id(node) not in alive:
                alive.add(id(node))
                pending.extend(node.inputs)
                for subgraph in node.subgraphs(recursive=True):
                    pending.extend(subgraph._foreign_tensors().values())
    return alive
