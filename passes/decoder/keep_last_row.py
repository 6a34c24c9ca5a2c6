"""Compute the logits of the last token alone.

A decoder that is asked for the next token needs one row of logits, the last; the rows before
it are predictions of a prompt that is known. Behind the last attention all operators treat
each row alone, so the last row is selected there:

    lm_head(norm(f(attention + hidden)))[-1:] = lm_head(norm(f(attention[-1:] + hidden[-1:]))).

In prefill that saves the head and the last block's MLP for S - 1 of S rows, and the logits'
memory; keys and values of the last block are computed before, for all S rows, as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally, Tensors
from ..editing import producer
from ..row_selection import RowSelection, select_rows_early


@dataclass(frozen=True)
class KeepLastRow(Pass):
    """``logits`` [S, V] to [1, V].

    Attributes:
        output_name: the output whose last row is wanted; rows lie along its axis -2.
    """

    output_name: str = "logits"

    name = "keep-last-row"
    summary = "the decoder's last rows alone go through the last MLP and the language head"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        logits = next((t for t in graph.outputs if t.name == self.output_name), None)
        made = producer(logits) if logits is not None else None
        if logits is None or made is None or not _has_rows(logits):
            return tally.result()
        problem = select_rows_early(graph, logits, RowSelection(-1, 1, "last_row"))
        if problem is None:
            tally.rewrote()
        else:
            tally.refuse(made, problem)
        return tally.result()

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """The last row of what the logits were."""
        if self.output_name not in outputs:
            return outputs
        return {**outputs, self.output_name: outputs[self.output_name][..., -1:, :]}


def _has_rows(logits: gs.Variable) -> bool:
    return bool(logits.shape) and len(logits.shape) >= 2 and logits.shape[-2] != 1
