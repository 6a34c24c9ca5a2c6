"""The attention of a decoder layer in the append form, found and checked as one block.

With T rows of past and S new ones, the captured graph computes for each layer

    K = concat(past_key, new_key), V = concat(past_value, new_value)      [T + S, H_kv, D]
    softmax(scale * q K' + mask) V,  mask[i, j] = 0 if j <= T + i else -1e30

with H_kv heads repeated to H by Unsqueeze, Expand and Reshape where they are fewer. What is
matched here is all of it but the projections and the rotary embedding; the mask is held to its
definition, down to the Shape nodes that T and S come from, since the operators that replace
the block make their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ..deferred import values_of
from ..editing import consumers, is_graph_input, is_graph_output, producer
from ..matching import (
    Match,
    Pattern,
    any_,
    cast,
    describe,
    find_matches,
    match_tensor,
    one_of,
    op,
)

MASKED = -1e4
"""A mask's fill must be at most this: far below any score."""


def _rows(past: str, new: str) -> Pattern:
    """Past and new rows, each head repeated or not."""
    rows = op("Concat", any_(past), any_(new), bind=f"{new}_rows", exact=True)
    unsqueeze = op("Unsqueeze", rows, any_(f"{new}_axes"))
    expand = op("Expand", unsqueeze, any_(), bind=f"{new}_expand")
    return one_of(op("Reshape", expand, any_(), bind=f"{new}_repeat"), rows)


_SCORES = op(
    "MatMul",
    op("Transpose", any_("query"), bind="query_transpose"),
    op("Transpose", _rows("past_key", "new_key"), bind="key_transpose"),
)
_MASKED = op("Add", cast(_SCORES), any_("mask"))
_WEIGHTS = cast(op("Softmax", cast(_MASKED), bind="softmax"))
_VALUES = op("Transpose", _rows("past_value", "new_value"), bind="value_transpose")
_PATTERN = op("Transpose", op("MatMul", _WEIGHTS, _VALUES), bind="output_transpose")
_MASK = cast(
    op(
        "Where",
        op("LessOrEqual", any_("keys"), op("Unsqueeze", any_("positions"), any_("axes"))),
        any_("visible"),
        any_("hidden"),
    )
)
_RANGE = op("Range", any_("start"), any_("end"), any_("step"))
_PERMUTATIONS = {
    "query_transpose": [1, 0, 2],
    "key_transpose": [1, 2, 0],
    "value_transpose": [1, 0, 2],
    "output_transpose": [1, 0, 2],
}


@dataclass(frozen=True)
class AttentionBlock:
    """One layer's attention.

    Attributes:
        match: its nodes; the root is the output [S, H, D].
        query: [S, H, D], rotated, not scaled.
        scale: what the scores are multiplied with.
        positions: int64 [S], T to T + S - 1.
    """

    match: Match
    query: gs.Variable
    scale: float
    positions: gs.Variable

    @property
    def node(self) -> gs.Node:
        """The node it ends in."""
        return self.match.nodes[0]

    @property
    def pasts(self) -> tuple[gs.Variable, gs.Variable]:
        """Past keys and values, [T, H_kv, D]."""
        return self.match["past_key"], self.match["past_value"]

    @property
    def rows(self) -> tuple[gs.Variable, gs.Variable]:
        """New keys, rotated, and values, [S, H_kv, D]."""
        return self.match["new_key"], self.match["new_value"]

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, H_kv and D."""
        return self.query.shape[1], self.rows[0].shape[1], self.query.shape[2]


def find_attention(graph: gs.Graph) -> Iterator[tuple[gs.Node, AttentionBlock | str]]:
    """Every block in the append form, or why it is none, by the node it ends in."""
    mask_problems: dict[int, str | None] = {}
    for match in find_matches(graph, _PATTERN):
        mask = match["mask"]
        if id(mask) not in mask_problems:
            mask_problems[id(mask)] = _mask_problem(mask)
        problem = _problem(graph, match) or mask_problems[id(mask)]
        yield match.nodes[0], problem or _block(graph, match)


def _block(graph: gs.Graph, match: Match) -> AttentionBlock:
    query, scale = _unscaled(graph, match["query"])
    found = match_tensor(_MASK, match["mask"])
    assert found is not None
    return AttentionBlock(match, query, scale, found["positions"])


def _unscaled(graph: gs.Graph, tensor: gs.Variable) -> tuple[gs.Variable, float]:
    """A tensor before a multiplication with a constant number, and the number; else 1."""
    node = producer(tensor)
    if node is None or node.op != "Mul" or len(consumers(tensor)) != 1:
        return tensor, 1.0
    if is_graph_output(graph, tensor):
        return tensor, 1.0
    for factor, other in (node.inputs, reversed(node.inputs)):
        if isinstance(factor, gs.Constant) and len(factor.shape) == 0:
            return other, float(values_of(factor))
    return tensor, 1.0


def _problem(graph: gs.Graph, match: Match) -> str | None:
    for name, wanted in _PERMUTATIONS.items():
        found = list(match[name].attrs.get("perm", []))
        if found != wanted:
            return f"{describe(match[name])} permutes by {found}, not {wanted}"
    if match["softmax"].attrs.get("axis", -1) not in (-1, 2):
        return f"{describe(match['softmax'])} is not over the keys"
    for part in ("key", "value"):
        problem = _rows_problem(graph, match, part)
        if problem is not None:
            return problem
    return match.used_elsewhere(graph)


def _rows_problem(graph: gs.Graph, match: Match, part: str) -> str | None:
    past, new, concat = match[f"past_{part}"], match[f"new_{part}"], match[f"new_{part}_rows"]
    if not is_graph_input(graph, past):
        return f"the past {past.name!r} is not an input of the graph"
    if not is_graph_output(graph, new):
        return f"the new rows {new.name!r} are not an output of the graph"
    if concat.attrs["axis"] not in (0, -3):
        return f"{describe(concat)} joins axis {concat.attrs['axis']}, not the rows"
    heads, kv_heads = match["query"].shape[1], new.shape[1]
    if f"new_{part}_repeat" not in match:
        if heads != kv_heads:
            return f"{kv_heads} heads of {new.name!r} meet {heads} of the query"
        return None
    axes, expand = match[f"new_{part}_axes"], match[f"new_{part}_expand"]
    if not isinstance(axes, gs.Constant) or values_of(axes).tolist() not in ([2], [-2]):
        return f"the heads of {new.name!r} are not repeated one by one"
    shape = expand.outputs[0].shape
    if shape is None or list(shape[1:3]) != [kv_heads, heads // kv_heads]:
        return f"{describe(expand)} repeats to {shape}, not to {heads} heads"
    return None


def _mask_problem(mask: gs.Tensor) -> str | None:
    found = match_tensor(_MASK, mask)
    what = f"the mask {mask.name!r}"
    if found is None:
        return f"{what} is not made by Where of LessOrEqual"
    visible, hidden = found["visible"], found["hidden"]
    if not (isinstance(visible, gs.Constant) and isinstance(hidden, gs.Constant)):
        return f"{what} has computed values"
    if values_of(visible).any() or not (values_of(hidden) <= MASKED).all():
        return f"{what} is not 0 where visible and {MASKED:g} or less elsewhere"
    axes = found["axes"]
    if not isinstance(axes, gs.Constant) or values_of(axes).tolist() not in ([1], [-1]):
        return f"{what} does not compare keys with positions"
    if _range_length(found["keys"]) != {"S": 1, "T": 1}:
        return f"{what} does not count the keys from 0 to T + S"
    return None if is_positions(found["positions"]) else f"{what} is not causal from row T on"


def is_positions(tensor: gs.Tensor) -> bool:
    """Whether a tensor is T, T + 1, ..., T + S - 1."""
    found = match_tensor(op("Add", any_("new"), any_("past")), tensor)
    if found is None:
        return False
    pairs = ((found["new"], found["past"]), (found["past"], found["new"]))
    return any(_range_length(a) == {"S": 1} and _length(b) == {"T": 1} for a, b in pairs)


def _range_length(tensor: gs.Tensor) -> dict[str, int] | None:
    """The length of a range from 0 in steps of 1, as a sum of S and T."""
    found = match_tensor(_RANGE, tensor)
    if found is None:
        return None
    for name, wanted in (("start", 0), ("step", 1)):
        bound = found[name]
        if not isinstance(bound, gs.Constant) or int(values_of(bound)) != wanted:
            return None
    return _length(found["end"])


def _length(tensor: gs.Tensor) -> dict[str, int] | None:
    """A number of rows, as a sum of S and T; None if it is something else."""
    node = producer(tensor)
    if node is None:
        return None
    if node.op in ("Squeeze", "Cast", "Identity", "Reshape"):
        return _length(node.inputs[0])
    if node.op == "Add":
        parts = [_length(value) for value in node.inputs]
        if parts[0] is None or parts[1] is None:
            return None
        return {
            key: parts[0].get(key, 0) + parts[1].get(key, 0) for key in parts[0] | parts[1]
        }
    if node.op != "Shape" or not counts_rows(node):
        return None
    axis = node.inputs[0].shape[0]
    return {axis: 1} if isinstance(axis, str) and not node.inputs[0].inputs else None


def counts_rows(shape: gs.Node) -> bool:
    """Whether a Shape node gives the first axis alone."""
    return (shape.attrs.get("start", 0), shape.attrs.get("end")) == (0, 1)
