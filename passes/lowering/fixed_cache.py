"""From the append form of the cache to the fixed form: the graph's inputs and outputs.

========  ========================================  ===========================================
          append                                    fixed, C rows of which T are filled
========  ========================================  ===========================================
inputs    ``past_key_values.n.*`` [T, H_kv, D]      the same, [1, H_kv, C, D]; ``past_length``
                                                    int64 [1] = T
outputs   ``present.n.*`` [S, H_kv, D], new rows    the same, [1, H_kv, C, D]; in rows T to
                                                    T + S - 1 the new ones
========  ========================================  ===========================================

In the fixed form a runtime gives a past and its present the same memory, so that the operator
that writes the new rows writes them in place and nothing else is moved. Rows behind T + S are
never read.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from ..base import Pass, PassResult, Tally, Tensors
from ..deferred import Array
from ..editing import consumers, fresh_name, is_graph_output, replace_tensor
from ..matching import describe
from .decoder_attention import AttentionBlock, counts_rows, find_attention

PAST_LENGTH = "past_length"


class FixedCachePass(Pass):
    """What the passes to the fixed form share: all layers are rewritten, or none.

    Args:
        capacity: C, the rows of each cache tensor; the model's largest position.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise PassError(f"A cache of {capacity} rows holds nothing; give 1 or more.")
        self.capacity = capacity

    @abstractmethod
    def rewrite(
        self, graph: gs.Graph, blocks: list[AttentionBlock], length: gs.Variable
    ) -> None:
        """Replace all blocks; their pasts get the new shape afterwards.

        Args:
            length: the input ``past_length``, int64 [1].
        """

    def block_problem(self, graph: gs.Graph, block: AttentionBlock) -> str | None:
        """Why a block cannot be replaced by this pass's operator; None if it can."""
        return None

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        found = [(node, self._checked(graph, block)) for node, block in find_attention(graph)]
        blocks = [block for _, block in found if isinstance(block, AttentionBlock)]
        whole = _unmatched_input(graph, blocks)
        refused = next((node for node, block in found if isinstance(block, str)), None)
        if refused is not None:
            whole = f"the block of {describe(refused)} keeps its cache, and all have one form"
        for node, block in found:
            if isinstance(block, str):
                tally.refuse(node, block)
            elif whole is not None:
                tally.refuse(node, whole)
        if whole is None and blocks:
            self._convert(graph, blocks)
            tally.rewrote(len(blocks))
        return tally.result()

    def _checked(self, graph: gs.Graph, block: AttentionBlock | str) -> AttentionBlock | str:
        if isinstance(block, str):
            return block
        return _past_problem(graph, block) or self.block_problem(graph, block) or block

    def _convert(self, graph: gs.Graph, blocks: list[AttentionBlock]) -> None:
        length = gs.Variable(PAST_LENGTH, np.dtype(np.int64), [1])
        pasts = [past for block in blocks for past in block.pasts]
        first = next(i for i, v in enumerate(graph.inputs) if any(v is p for p in pasts))
        graph.inputs.insert(first, length)
        self.rewrite(graph, blocks, length)
        for past in pasts:
            for node in [n for n in consumers(past) if n.op == "Shape"]:
                replace_tensor(graph, node.outputs[0], length)
            past.shape = [1, past.shape[1], self.capacity, past.shape[2]]

    def feeds_before(self, feeds: Tensors) -> Tensors:
        """The filled rows of each cache, rows first."""
        if PAST_LENGTH not in feeds:
            return feeds
        filled = int(feeds[PAST_LENGTH][0])
        return {
            name: np.ascontiguousarray(value[0, :, :filled].transpose(1, 0, 2))
            if name.startswith("past_key_values.")
            else value
            for name, value in feeds.items()
            if name != PAST_LENGTH
        }

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """Each cache with the new rows behind the filled ones."""
        if PAST_LENGTH not in feeds:
            return outputs
        filled = int(feeds[PAST_LENGTH][0])
        return {
            name: self._written(
                feeds[name.replace("present", "past_key_values", 1)], v, filled
            )
            if name.startswith("present.")
            else v
            for name, v in outputs.items()
        }

    def _written(self, cache: Array, rows: Array, filled: int) -> Array:
        written: Array = cache.copy()
        written[0, :, filled : filled + len(rows)] = rows.transpose(1, 0, 2)
        return written


def _past_problem(graph: gs.Graph, block: AttentionBlock) -> str | None:
    nodes = {id(node) for node in block.match.nodes}
    for past in block.pasts:
        for node in consumers(past):
            if id(node) not in nodes and not (node.op == "Shape" and counts_rows(node)):
                return f"the past {past.name!r} is also read by {describe(node)}"
            if node.op == "Shape" and is_graph_output(graph, node.outputs[0]):
                length = node.outputs[0].name
                return f"{length!r}, the rows of {past.name!r}, is an output of the graph"
    return None


def _unmatched_input(graph: gs.Graph, blocks: list[AttentionBlock]) -> str | None:
    matched = {id(past) for block in blocks for past in block.pasts}
    for tensor in graph.inputs:
        if tensor.name.startswith("past_key_values.") and id(tensor) not in matched:
            return f"no attention was found for the past {tensor.name!r}"
    return None


def make_present(graph: gs.Graph, rows: gs.Variable, capacity: int) -> gs.Variable:
    """The cache after the step: takes the name of ``rows`` and their place as an output."""
    present = gs.Variable(rows.name, rows.dtype, [1, rows.shape[1], capacity, rows.shape[2]])
    rows.name = fresh_name(graph, f"{rows.name}.new_rows")
    for index, output in enumerate(graph.outputs):
        if output is rows:
            graph.outputs[index] = present
    return present
