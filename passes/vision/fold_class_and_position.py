"""Fold the class embedding and the position embeddings into one constant.

CLIP puts the class row in front of the N patch rows and adds a position to each of the N + 1:

    concat(class, patches) + position = pad(patches) + c,
    c = concat(class + position[:1], position[1:]),

where pad puts a row of zeros in front. The row's copies for each image of the batch (Shape,
Concat, Expand) are no longer needed. Exact bit for bit: ``class + position[0]`` is rounded as
before, and 0 + c is c.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive
from ..editing import fresh_name, insert_node, unlink
from ..matching import Match, any_, constant_problem, find_matches, op

_ROW = op("Expand", any_("class"), any_(), bind="row")
_PATTERN = op("Add", op("Concat", _ROW, any_("patches"), bind="join", exact=True), any_("pos"))


class FoldClassAndPosition(Pass):
    """``Concat(class, patches) + position`` to ``Pad(patches) + constant``."""

    name = "fold-class-and-position"
    summary = "class and position embeddings become one constant, added to padded patches"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            add = match.nodes[0]
            problem = _problem(graph, match)
            if problem is None:
                _fold(graph, match)
                tally.rewrote()
            else:
                tally.refuse(add, problem)
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    row, join, patches = match["row"], match["join"], match["patches"]
    cls, position = match["class"], match["pos"]
    unusable = (
        constant_problem(graph, cls, row)
        or constant_problem(graph, position, match.nodes[0])
        or match.used_elsewhere(graph)
    )
    if unusable is not None:
        return unusable
    shape, expanded = join.outputs[0].shape, row.outputs[0].shape
    if shape is None or len(shape) != 3 or join.attrs["axis"] not in (1, -2):
        return f"{join.outputs[0].name!r} is not rows joined along axis 1 of [B, rows, C]"
    rows, width = shape[1:]
    if expanded is None or expanded[1] != 1 or not isinstance(rows, int):
        return f"{row.outputs[0].name!r} is {expanded}, not one row before a known number"
    if cls.shape[-1] != width or int(np.prod(cls.shape)) != width:
        return f"the class embedding {cls.name!r} is {list(cls.shape)}, not one row of {width}"
    if list(position.shape) not in ([rows, width], [1, rows, width]):
        return f"the positions {position.name!r} are {list(position.shape)}, not {rows} rows"
    if patches.dtype != position.dtype or cls.dtype != position.dtype:
        return f"{position.name!r} and {patches.name!r} differ in dtype"
    return None


def _fold(graph: gs.Graph, match: Match) -> None:
    add, cls, position = match.nodes[0], match["class"], match["pos"]
    joined = match["join"].outputs[0]
    shape = joined.shape[1:]

    def merge(row: Array, positions: Array) -> Array:
        merged: Array = positions.reshape(shape).copy()
        merged[0] = row.reshape(-1) + merged[0]
        return merged

    name = fresh_name(graph, f"{position.name}.with_class")
    pads = np.array([0, 1, 0, 0, 0, 0], np.int64)
    padded = insert_node(
        graph, "Pad", [match["patches"], pads], joined, attrs={"mode": "constant"},
        stem="patches_after_class",
    )  # fmt: skip
    add.inputs = [padded, derive(name, [cls, position], merge, shape)]
    unlink(match["join"])
    unlink(match["row"])
