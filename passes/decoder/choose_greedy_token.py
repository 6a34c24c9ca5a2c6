"""Let the graph choose the greedy token.

next_token = argmax(logits), the first of equal ones, as ``numpy.argmax`` has it; -1 where one
of the logits is NaN or infinite, of which an argmax alone tells nothing. A runtime that
decodes greedily then fetches 8 bytes a step and no logits (V float32, 128 kB for a vocabulary
of 32000); one that samples fetches the logits as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from mvlm_export.engines.manifest import LAST_ROWS

from ..base import Pass, PassResult, Tally, Tensors
from ..editing import insert_node, producer
from ..matching import is_op

NOT_FINITE = -1
"""The token that stands for logits that are not finite."""


@dataclass(frozen=True)
class ChooseGreedyToken(Pass):
    """An output ``next_token`` int64 [1] beside ``logits`` [1, V], or [R] beside [R, V].

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
            graph.outputs.append(self._choose(graph, logits))
            tally.rewrote()
        else:
            tally.refuse(made, problem)
        return tally.result()

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """The token that the logits give."""
        if self.logits_name not in outputs:
            return outputs
        logits = outputs[self.logits_name]
        finite = np.isfinite(logits).all(axis=-1)
        token = np.where(finite, np.argmax(logits, axis=-1), NOT_FINITE).astype(np.int64)
        return {**outputs, self.token_name: token}

    def _choose(self, graph: gs.Graph, logits: gs.Variable) -> gs.Variable:
        stem, attrs = self.token_name, {"axis": -1, "keepdims": 0, "select_last_index": 0}
        likeliest = insert_node(
            graph, "ArgMax", [logits], shape=logits.shape[:1], dtype=np.int64, attrs=attrs,
            stem=f"{stem}_likeliest",
        )  # fmt: skip
        bad = self._not_finite(graph, logits)
        replaced = np.array([NOT_FINITE], np.int64)
        return insert_node(graph, "Where", [bad, replaced, likeliest], likeliest, stem=stem)

    def _not_finite(self, graph: gs.Graph, logits: gs.Variable) -> gs.Variable:
        """bool [1] or [R]: whether any of the row's logits is NaN or infinite."""
        stem, row = f"{self.token_name}_not_finite", logits.shape
        nan = insert_node(graph, "IsNaN", [logits], shape=row, dtype=bool, stem=stem)
        inf = insert_node(graph, "IsInf", [logits], shape=row, dtype=bool, stem=stem)
        bad = insert_node(graph, "Or", [nan, inf], nan, stem=stem)
        # No TensorRT reduces booleans.
        to_int, to_bool = {"to": int(TensorProto.INT32)}, {"to": int(TensorProto.BOOL)}
        count = insert_node(graph, "Cast", [bad], bad, dtype=np.int32, attrs=to_int, stem=stem)
        most = insert_node(
            graph, "ReduceMax", [count, np.array([1], np.int64)], shape=row[:1],
            dtype=np.int32, attrs={"keepdims": 0}, stem=stem,
        )  # fmt: skip
        return insert_node(graph, "Cast", [most], most, dtype=bool, attrs=to_bool, stem=stem)

    def _done(self, graph: gs.Graph) -> bool:
        tokens = [t for t in graph.outputs if t.name == self.token_name]
        return any(is_op(producer(t), "Where") for t in tokens)

    def _problem(self, graph: gs.Graph, logits: gs.Variable) -> str | None:
        rows = (1, LAST_ROWS)
        if logits.shape is None or len(logits.shape) != 2 or logits.shape[0] not in rows:
            return (
                f"{logits.name!r} is {logits.shape}, not one row [1, V]; keep-last-row must "
                "go before"
            )
        names = set(graph.tensors()) | {node.name for node in graph.nodes}
        if self.token_name in names:
            return f"the name {self.token_name!r} is taken"
        return None
