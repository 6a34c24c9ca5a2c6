"""Merge constants that hold the same.

Two constants are the same if dtype, shape and bytes are (so -0.0 is not 0.0). Small ones are
compared by content. Of large ones, reading every pair would cost a minute on a 7B model and
find nothing: they are merged only where both hold one and the same values object, which is
what a weight bound twice looks like.

Zero points of quantized weights are left alone: ONNX Runtime makes unsigned codes of signed
ones for CPUs without VNNI, each with a zero point of its own, and fails to load a graph where
two weights share one.

A merged weight has two readers, and a rewrite that folds something into a weight refuses one
that is shared: run this pass after those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import stored_bytes, values_of
from ..editing import consumers, is_graph_input, is_graph_output
from ..matching import is_op


class MergeDuplicateConstants(Pass):
    """Equal constants to one.

    Args:
        limit: constants of at most so many bytes are compared by content.
    """

    name = "merge-duplicate-constants"
    summary = "constants of equal dtype, shape and content become one"

    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit = limit

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for alike in self._alike(graph):
            groups: dict[Hashable, gs.Constant] = {}
            for constant in alike:
                first = groups.setdefault(self._identity(constant), constant)
                if first is not constant:
                    _merge(graph, constant, first, tally)
        return tally.result()

    def _alike(self, graph: gs.Graph) -> Iterable[list[gs.Constant]]:
        """Constants of one dtype and shape, where there is more than one."""
        found: dict[Hashable, list[gs.Constant]] = defaultdict(list)
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant) and not _is_zero_of_weight(tensor):
                found[str(tensor.dtype), tuple(tensor.shape)].append(tensor)
        return [alike for alike in found.values() if len(alike) > 1]

    def _identity(self, constant: gs.Constant) -> Hashable:
        if stored_bytes(constant.shape, constant.dtype) > self.limit:
            return id(constant._values)
        return bytes(values_of(constant).tobytes())


def _is_zero_of_weight(constant: gs.Constant) -> bool:
    return any(
        is_op(node, "DequantizeLinear")
        and len(node.inputs) == 3
        and node.inputs[2] is constant
        and isinstance(node.inputs[0], gs.Constant)
        for node in consumers(constant)
    )


def _merge(graph: gs.Graph, constant: gs.Constant, first: gs.Constant, tally: Tally) -> None:
    readers = consumers(constant)
    if not readers and not consumers(first):
        return  # two outputs of the graph that no node reads
    for tensor in (constant, first):
        if is_graph_input(graph, tensor) or is_graph_output(graph, tensor):
            side = "an input" if is_graph_input(graph, tensor) else "an output"
            tally.refuse(
                (readers or consumers(first))[0],
                f"{constant.name!r} equals {first.name!r}, but {tensor.name!r} is {side} of "
                "the graph",
            )
            return
    for node in readers:
        for index, tensor in enumerate(node.inputs):
            if tensor is constant:
                node.inputs[index] = first
    tally.rewrote()
