"""Take out operators that leave their input as it is, and merge those that only move it twice.

    Identity(x) = x            Cast(x, to its own dtype) = x       Concat(x) = x
    Dropout(x) = x             Expand(x, to its own shape) = x     Slice(x, all of it) = x
    x * 1 = x / 1 = x
    Reshape(x, its own shape) = x         Reshape(Reshape(x, s), t) = Reshape(x, t)
    Transpose(x, 0 1 2 ...) = x           Transpose(Transpose(x, p), q) = Transpose(x, p[q])
    Unsqueeze(Squeeze(x, a), a) = Squeeze(Unsqueeze(x, a), a) = x

All are exact to the bit, so x + 0 is not among them, which turns -0.0 into 0.0. A shape is
"its own" if it is known to be: every axis is known, or all but one, which the number of
elements then gives. An inner operator that is read elsewhere too is kept, and nothing is
merged across it unless both vanish. Outputs of the graph keep their names. The rules are in
:mod:`.layout_rules`.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..editing import consumers, is_graph_output, live_nodes, unlink
from ..matching import describe, is_foreign
from .bypass import bypass
from .layout_rules import RULES, Finding, Merge


class CleanLayout(Pass):
    """Operators that do nothing, and pairs that undo or repeat each other."""

    name = "clean-layout"
    summary = "operators that do nothing go, successive reshapes and transposes become one"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        while True:
            changed, refused = _sweep(graph)
            tally.rewrote(changed)
            if not changed:
                break
        for node, reason in refused:
            tally.refuse(node, reason)
        return tally.result()


def _sweep(graph: gs.Graph) -> tuple[int, list[tuple[gs.Node, str]]]:
    """Visit every node once; how many were rewritten, and what was refused."""
    changed, refused = 0, []
    for node in live_nodes(graph):
        found = None
        for rule in () if is_foreign(node) else RULES.get(node.op, ()):
            found = rule(graph, node)
            if found is not None:
                break
        if found is None:
            continue
        problem = _apply(graph, node, found)
        if problem is None:
            changed += 1
        else:
            refused.append((node, problem))
    return changed, refused


def _apply(graph: gs.Graph, node: gs.Node, found: Finding | str) -> str | None:
    """Rewrite ``node`` as a rule found; a reason if that cannot be."""
    if isinstance(found, str):
        return found
    if isinstance(found, Merge):
        return _merge(graph, node, found)
    return bypass(graph, node, found)


def _merge(graph: gs.Graph, node: gs.Node, found: Merge) -> str | None:
    moved = found.inner.outputs[0]
    if is_graph_output(graph, moved):
        return f"{moved.name!r} between them is an output of the graph"
    for reader in consumers(moved):
        if reader is not node:
            return f"{moved.name!r} between them is also read by {describe(reader)}"
    node.inputs[0] = found.inner.inputs[0]
    for index, tensor in found.inputs.items():
        node.inputs[index] = tensor
    node.attrs.update(found.attrs)
    unlink(found.inner)
    return None
