"""Drop what the vision encoder computes in vain behind its last attention.

The encoder gives hidden[:, 1:], the patches without the class row, yet the last block's output
projection and MLP compute that row too. They treat each row alone, so

    f(attention + hidden)[:, 1:] = f(attention[:, 1:] + hidden[:, 1:]),

and the rows are selected right behind the attention, which does need the class row's key and
value. The block then works on N rows (576), not N + 1 (577): a friendlier size for a GEMM.

Nodes that reach no output are removed first: CLIP's last LayerNorm, its pooled output, and
blocks behind the selected hidden state, if an exporter left them in.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import values_of
from ..editing import is_graph_output, producer, replace_tensor
from ..row_selection import RowSelection, select_rows_early


class DropVisionTail(Pass):
    """Select the patch rows before the last block's MLP; remove dead nodes.

    A dead tail counts as one rewrite, each selection that moved as another.
    """

    name = "drop-vision-tail"
    summary = "the class row is dropped behind the last attention, not behind the last MLP"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        before = len(graph.nodes)
        graph.cleanup()
        if len(graph.nodes) < before:
            tally.rewrote()
        for cut in [_final_slice(output) for output in graph.outputs]:
            if cut is None or cut.inputs[0].shape is None:
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
    while node is not None and node.op == "Cast":
        node = producer(node.inputs[0])
    return node if node is not None and node.op == "Slice" else None


def _problem(graph: gs.Graph, cut: gs.Node) -> str | None:
    hidden, rows = cut.inputs[0], cut.outputs[0].shape
    if not all(isinstance(bound, gs.Constant) for bound in cut.inputs[1:]):
        return "its bounds are computed"
    if is_graph_output(graph, hidden):
        return f"{hidden.name!r} is also an output of the graph"
    _, end, axes, steps = _bounds(cut)
    rank = len(hidden.shape)
    if rank < 2 or [axis % rank for axis in axes] != [rank - 2] or steps != [1]:
        return f"it cuts the axes {axes} in steps of {steps}, not rows"
    if hidden.shape[-2] is None or not isinstance(rows and rows[-2], int):
        return f"the rows of {hidden.name!r} are not known"
    if end[0] < 0 or (isinstance(hidden.shape[-2], int) and end[0] < hidden.shape[-2]):
        return f"it ends at row {end[0]}, not at the last"
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
    return problem
