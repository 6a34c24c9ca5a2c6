"""Let the graph choose the greedy token.

next_token = argmax(logits), the first of equal ones, as ``numpy.argmax`` has it. A runtime
that decodes greedily then fetches 8 bytes a step and no logits (V float32, 128 kB for a
vocabulary of 32000); one that samples fetches the logits as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally, Tensors
from ..editing import insert_node, producer


@dataclass(frozen=True)
class ChooseGreedyToken(Pass):
    """An output ``next_token`` int64 [1] beside ``logits`` [1, V].

    Attributes:
        logits_name: the output to choose from.
        token_name: the output to add.
    """

    logits_name: str = "logits"
    token_name: str = "next_token"

    name = "choose-greedy-token"
    summary = "the graph gives the most likely token beside the logits"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        logits = next((t for t in graph.outputs if t.name == self.logits_name), None)
        made = producer(logits) if logits is not None else None
        if logits is None or made is None or self._done(graph):
            return tally.result()
        problem = self._problem(graph, logits)
        if problem is None:
            attrs = {"axis": -1, "keepdims": 0, "select_last_index": 0}
            token = insert_node(
                graph, "ArgMax", [logits], shape=[1], dtype=np.int64, attrs=attrs,
                stem=self.token_name,
            )  # fmt: skip
            graph.outputs.append(token)
            tally.rewrote()
        else:
            tally.refuse(made, problem)
        return tally.result()

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """The token that the logits give."""
        if self.logits_name not in outputs:
            return outputs
        token = np.argmax(outputs[self.logits_name], axis=-1).astype(np.int64)
        return {**outputs, self.token_name: token}

    def _done(self, graph: gs.Graph) -> bool:
        tokens = [t for t in graph.outputs if t.name == self.token_name]
        return any((made := producer(t)) is not None and made.op == "ArgMax" for t in tokens)

    def _problem(self, graph: gs.Graph, logits: gs.Variable) -> str | None:
        if logits.shape is None or len(logits.shape) != 2 or logits.shape[0] != 1:
            return (
                f"{logits.name!r} is {logits.shape}, not one row [1, V]; keep-last-row must "
                "go before"
            )
        names = set(graph.tensors()) | {node.name for node in graph.nodes}
        if self.token_name in names:
            return f"the name {self.token_name!r} is taken"
        return None
