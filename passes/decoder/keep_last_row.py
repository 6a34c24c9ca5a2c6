"""Compute the logits of the last token alone, or of the last few.

A decoder that is asked for the next token needs one row of logits, the last; the rows before
it are predictions of a prompt that is known. Behind the last attention all operators treat
each row alone, so the last row is selected there:

    lm_head(norm(f(attention + hidden)))[-1:] = lm_head(norm(f(attention[-1:] + hidden[-1:]))).

In prefill that saves the head and the last block's MLP for S - 1 of S rows, and the logits'
memory; keys and values of the last block are computed before, for all S rows, as ever.

With a count of R rows min(S, R) are kept: one in a step of one token, and all of a drafted
continuation of up to R - 1 tokens that is to be verified in one run.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from mvlm_export.engines.manifest import LAST_ROWS

from ..base import Pass, PassResult, Tally, Tensors
from ..editing import producer
from ..row_selection import RowSelection, select_rows_early


@dataclass(frozen=True)
class KeepLastRow(Pass):
    """``logits`` [S, V] to [1, V], or to [min(S, count), V].

    Attributes:
        output_name: the output whose last row is wanted; rows lie along its axis -2.
        count: most rows that are kept.
    """

    output_name: str = "logits"
    count: int = 1

    name = "keep-last-row"
    summary = "the decoder's last rows alone go through the last MLP and the language head"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        logits = next((t for t in graph.outputs if t.name == self.output_name), None)
        made = producer(logits) if logits is not None else None
        if logits is None or made is None or not self._has_rows(logits):
            return tally.result()
        rows = 1 if self.count == 1 else LAST_ROWS
        selection = RowSelection(-self.count, rows, "last_row")
        problem = select_rows_early(graph, logits, selection)
        if problem is None:
            tally.rewrote()
        else:
            tally.refuse(made, problem)
        return tally.result()

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """The last rows of what the logits were."""
        if self.output_name not in outputs:
            return outputs
        rows = outputs[self.output_name][..., -self.count :, :]
        return {**outputs, self.output_name: rows}

    def _has_rows(self, logits: gs.Variable) -> bool:
        if not logits.shape or len(logits.shape) < 2:
            return False
        return logits.shape[-2] not in (1, LAST_ROWS)
