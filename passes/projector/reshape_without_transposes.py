"""Turn a channels-last map into tokens, or tokens into such a map, by a Reshape alone.

    [B, H, W, C] -T(0, 3, 1, 2)-> [B, C, H, W] -Reshape-> [B, C, HW] -T(0, 2, 1)-> [B, HW, C]

reads and writes every element twice to leave all of them where they were: both ends have the
order b, h, w, c. So it is one Reshape of [B, H, W, C] to [B, HW, C]. The same holds the other
way round. Exact to the bit. (V1's LDP, arXiv 2312.16886, ends so: its last LayerNorm is over
channels, and the decoder wants tokens.)
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import values_of
from ..editing import insert_node, replace_tensor, unlink
from ..matching import Match, any_, find_matches, op

_PATTERN = op(
    "Transpose",
    op("Reshape", op("Transpose", any_("x"), bind="first"), any_("sizes"), bind="reshape"),
    bind="second",
)
_PERMUTATIONS = (([0, 3, 1, 2], [0, 2, 1]), ([0, 2, 1], [0, 2, 3, 1]))


class ReshapeWithoutTransposes(Pass):
    """``Transpose, Reshape, Transpose`` between a channels-last map and tokens."""

    name = "reshape-without-transposes"
    summary = "a channels-last map becomes tokens, or the reverse, by a Reshape alone"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            perms = [match[name].attrs.get("perm") for name in ("first", "second")]
            if not any(perms == list(known) for known in _PERMUTATIONS):
                continue
            problem = match.used_elsewhere(graph) or _shape_problem(match)
            if problem is None:
                _replace(graph, match)
                tally.rewrote()
            else:
                tally.refuse(match["second"], problem)
        return tally.result()


def _shape_problem(match: Match) -> str | None:
    """Why the Reshape does more than join or split the axes of the map."""
    if not isinstance(match["sizes"], gs.Constant):
        return f"the sizes {match['sizes'].name!r} are computed"
    reshape = match["reshape"]
    before, after = reshape.inputs[0].shape, reshape.outputs[0].shape
    if before is None or after is None:
        return f"the shape of {reshape.outputs[0].name!r} is not known"
    if not all(isinstance(axis, int) for axis in (*before[1:], *after[1:])):
        return f"the shapes {before} and {after} are not known"
    if before[1] != after[1] or math.prod(before[2:]) != math.prod(after[2:]):
        return f"the Reshape of {before} to {after} mixes channels"
    return None


def _replace(graph: gs.Graph, match: Match) -> None:
    old = match.root
    batch = int(values_of(match["sizes"])[0])
    made = insert_node(
        graph,
        "Reshape",
        [match["x"], np.array([batch, *old.shape[1:]], np.int64)],
        like=old,
        attrs=dict(match["reshape"].attrs),
    )
    replace_tensor(graph, old, made)
    for node in match.nodes:
        unlink(node)
