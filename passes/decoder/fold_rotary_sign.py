"""Put the sign of the rotary embedding into its sine table.

LLaMA rotates x = [x1, x2] as x * cos + rotate_half(x) * sin with rotate_half(x) = [-x2, x1].
A product may be negated on either side,

    [-x2, x1] * [s1, s2] = [x2, x1] * [-s1, s2],

so the first half of each row of the table is negated once, and two Neg a layer go. Exact bit
for bit. All that the table feeds must be such rotations. (RoFormer: arXiv 2104.09864, equation
34, in the half-split order of Hugging Face.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive
from ..editing import consumers, fresh_name, is_graph_output, producer
from ..matching import Match, any_, constant_problem, describe, find_matches, is_op, op

_HALVES = op("Concat", op("Neg", any_("second")), any_("first"), bind="join", exact=True)
_PATTERN = op("Mul", _HALVES, any_("sin"))
_CARRIERS = ("Cast", "Gather", "Squeeze", "Unsqueeze")


class FoldRotarySign(Pass):
    """``Concat(-x2, x1) * sin`` to ``Concat(x2, x1) * sin'``."""

    name = "fold-rotary-sign"
    summary = "the sine table carries the sign of rotate_half"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        tables: dict[int, _Table] = {}
        for match in find_matches(graph, _PATTERN):
            source = _source(match["sin"])
            tables.setdefault(id(source), _Table(source)).rotations.append(match)
        for table in tables.values():
            problem = table.problem(graph)
            if problem is None:
                table.negate(graph)
                tally.rewrote(len(table.rotations))
            else:
                for match in table.rotations:
                    tally.refuse(match.nodes[0], problem)
        return tally.result()


@dataclass
class _Table:
    """A sine table and the rotations that read it."""

    values: gs.Tensor
    rotations: list[Match] = field(default_factory=list)

    def problem(self, graph: gs.Graph) -> str | None:
        """Why its sign cannot change; None if it can."""
        readers = consumers(self.values)
        unusable = constant_problem(graph, self.values, *readers)
        if unusable is not None:
            return unusable.replace("weight", "table")
        width = self.values.shape[-1] if self.values.shape else 1
        for match in self.rotations:
            halves = match["join"].inputs
            if any(not half.shape or half.shape[-1] != width / 2 for half in halves):
                return f"{describe(match['join'])} does not join two halves of {width}"
            if is_op(producer(match["second"]), "Neg"):
                return f"{match['second'].name!r} is negated twice"
            if not _is_last(match["join"], halves[0]):
                return f"{describe(match['join'])} does not join along the last axis"
            if len(consumers(match["join"].outputs[0])) > 1:
                return f"{match['join'].outputs[0].name!r} is also read elsewhere"
            if is_graph_output(graph, match["join"].outputs[0]):
                return f"{match['join'].outputs[0].name!r} is also an output of the graph"
        rotating = {id(match.nodes[0]) for match in self.rotations}
        return _other_use(graph, self.values, width, rotating)

    def negate(self, graph: gs.Graph) -> None:
        """Negate the table's first half, and join the halves as they are."""
        half = self.values.shape[-1] // 2

        def negate_first(values: Array) -> Array:
            signed: Array = values.copy()
            signed[..., :half] *= -1
            return signed

        name = fresh_name(graph, f"{self.values.name}.signed")
        signed = derive(name, [self.values], negate_first, self.values.shape)
        for reader in consumers(self.values):
            reader.inputs = [signed if t is self.values else t for t in reader.inputs]
        for match in self.rotations:
            match["join"].inputs[0] = match["second"]


def _source(sin: gs.Tensor) -> gs.Tensor:
    """What rows were gathered from."""
    node = producer(sin)
    while is_op(node, *_CARRIERS):
        sin = node.inputs[0]
        node = producer(sin)
    return sin


def _is_last(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a node's axis is the last of a tensor."""
    rank = len(tensor.shape)
    return bool(node.attrs.get("axis", 0) % rank == rank - 1)


def _other_use(
    graph: gs.Graph, tensor: gs.Tensor, width: int, rotating: set[int]
) -> str | None:
    """Who else reads the table's rows, or takes them apart; None if nobody does."""
    if is_graph_output(graph, tensor):
        return f"{tensor.name!r} is also an output of the graph"
    if not tensor.shape or tensor.shape[-1] != width:
        return f"{tensor.name!r} does not hold whole rows of the table"
    for reader in consumers(tensor):
        if id(reader) in rotating:
            continue
        carried = is_op(reader, *_CARRIERS) and reader.inputs[0] is tensor
        if not carried or (reader.op == "Gather" and _is_last(reader, tensor)):
            return f"{tensor.name!r} is also read by {describe(reader)}"
        problem = _other_use(graph, reader.outputs[0], width, rotating)
        if problem is not None:
            return problem
    return None
