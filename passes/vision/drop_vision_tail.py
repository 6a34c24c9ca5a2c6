"""Drop what the vision encoder computes in vain behind its last attention.

The encoder gives hidden[:, 1:], the patches without the class row, yet the last block's output
projection and MLP compute that row too. They treat each row alone, so

    f(attention + hidden)[:, 1:] = f(attention[:, 1:] + hidden[:, 1:]),

and the rows are selected right behind the attention, which does need the class row's key and
value. The block then works on N rows (576), not N + 1 (577): a friendlier size for a GEMM.

What an exporter left in behind the selected hidden state (CLIP's last LayerNorm, its pooled
output, further blocks) reads that state whole: ``remove-dead-code`` goes before.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import values_of
from ..editing import is_graph_output, producer, replace_tensor, unlink
from ..matching import is_op
from ..row_selection import RowSelection, select_rows_early

_TO_THE_END = np.iinfo(np.int32).max
"""Ends from here on mean the last row, however many there are."""


class DropVisionTail(Pass):
    """Select the patch rows before the last block's MLP."""

    name = "drop-vision-tail"
    summary = "the class row is dropped behind the last attention, not behind the last MLP"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        found = [_final_slice(output) for output in graph.outputs]
        for cut in {id(cut): cut for cut in found if cut is not None}.values():
            if cut.inputs[0].shape is None:
                continue
            problem = _problem(graph, cut) or _hoist(graph, cut)
            if problem is None:
                tally.rewrote()
            else:
                tally.refuse(cut, problem)
        return tally.result()


def _final_slice(output: gs.Tensor) -> gs.Node | None:
    """The Slice that makes an output, perhaps with Casts behind it."""
    node = producer(output)
    while is_op(node, "Cast"):
        node = producer(node.inputs[0])
    return node if is_op(node, "Slice") else None


def _problem(graph: gs.Graph, cut: gs.Node) -> str | None:
    hidden = cut.inputs[0]
    if not all(isinstance(bound, gs.Constant) for bound in cut.inputs[1:]):
        return "its bounds are computed"
    if is_graph_output(graph, hidden):
        return f"{hidden.name!r} is also an output of the graph"
    _, end, axes, steps = _bounds(cut)
    rank = len(hidden.shape)
    if rank < 2 or [axis % rank for axis in axes] != [rank - 2] or steps != [1]:
        return f"it cuts the axes {axes} in steps of {steps}, not rows"
    return _rows_problem(hidden, cut.outputs[0], end[0])


def _rows_problem(hidden: gs.Tensor, patches: gs.Tensor, end: int) -> str | None:
    """Why a Slice does not take some rows up to the last."""
    before, after = hidden.shape[-2], patches.shape[-2] if patches.shape else None
    if before is None or not isinstance(after, int):
        return f"the rows of {hidden.name!r} are not known"
    if end < (before if isinstance(before, int) else _TO_THE_END):
        return f"it ends at row {end}, not at the last"
    if before == 1 or after == 0:
        return f"it takes {after} of the {before} rows of {hidden.name!r}"
    return None


def _bounds(cut: gs.Node) -> list[list[int]]:
    """Starts, ends, axes and steps."""
    given = [values_of(bound).tolist() for bound in cut.inputs[1:]]
    if len(given) < 3:
        given.append(list(range(len(given[0]))))
    if len(given) < 4:
        given.append([1] * len(given[0]))
    return given


def _hoist(graph: gs.Graph, cut: gs.Node) -> str | None:
    hidden, patches = cut.inputs[0], cut.outputs[0]
    selection = RowSelection(_bounds(cut)[0][0], patches.shape[-2], "patches")
    problem = select_rows_early(graph, hidden, selection, reader=cut)
    if problem is None:
        replace_tensor(graph, patches, hidden)
        unlink(cut)
    return problem
