"""Look rotary angles up instead of computing them.

Exporters of LLaMA as transformers writes it leave the angles in the graph: positions are cast
to float, multiplied by the D/2 inverse frequencies f, doubled, and go through Cos and Sin:

    cos([p f, p f]) = C[p],   C[p, i] = cos(p f[i mod D/2])   for 0 <= p < max_positions.

The angle p f is rounded to float32 as in the graph (at p = 2000 that rounding alone moves a
cosine by up to 6e-5), its cosine is computed in float64 and rounded once. So a table is as
exact as the graph's angles allow, whatever a device's Cos makes of large ones.
(RoFormer: arXiv 2104.09864.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive
from ..editing import fresh_name, insert_node, live_nodes, producer, replace_tensor, unlink
from ..matching import any_, describe, is_op, match_tensor, one_of, op

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {"Cos": np.cos, "Sin": np.sin}
# They keep the numbers and their order; what Expand repeats is found by the shapes.
_VIEWS = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_ROWS = op(("Mul", "MatMul"), any_("left"), any_("right"), bind="product")
_ANGLES = one_of(op("Transpose", _ROWS, bind="turn"), _ROWS)
_EXACT = (np.int32, np.int64, np.float32)


@dataclass(frozen=True)
class _Angles:
    """What the argument of a Cos or Sin is made of.

    Attributes:
        positions: the integer positions, then their views, as far as the product.
        frequencies: the inverse frequencies and their views likewise.
        product: multiplies them.
        turn: a Transpose behind it, where positions lie along its last axis.
        repeats: how often each row of angles stands beside itself.
    """

    positions: list[gs.Tensor]
    frequencies: list[gs.Tensor]
    product: gs.Node
    turn: gs.Node | None
    repeats: int


@dataclass(frozen=True)
class ConstantRotaryTables(Pass):
    """Cos and Sin of positions times frequencies to a Gather from a table each.

    Attributes:
        max_positions: rows of the tables; no position may reach it.
    """

    max_positions: int

    name = "constant-rotary-tables"
    summary = "cosines and sines of rotary angles are looked up in tables"

    def __post_init__(self) -> None:
        if self.max_positions < 1:
            raise PassError(
                f"{self.name} got max_positions={self.max_positions}: give the model's "
                "max_position_embeddings."
            )

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        tables: dict[tuple[Any, ...], gs.Constant] = {}
        for node in live_nodes(graph):
            angles = _find_angles(node)
            if angles is None:
                continue
            problem = _problem(node, angles)
            if problem is not None:
                tally.refuse(node, problem)
                continue
            key = (node.op, id(angles.frequencies[0]), angles.repeats)
            if key not in tables:
                tables[key] = self._table(graph, node.op, angles)
            _look_up(graph, node, tables[key], angles.positions[0])
            tally.rewrote()
        return tally.result()

    def _table(self, graph: gs.Graph, function: str, angles: _Angles) -> gs.Constant:
        source = angles.frequencies[0]
        shape = (self.max_positions, int(np.prod(source.shape)) * angles.repeats)

        def compute(frequencies: Array) -> Array:
            positions = np.arange(self.max_positions, dtype=np.float32)
            rounded = positions[:, None] * frequencies.reshape(1, -1)
            values = _FUNCTIONS[function](rounded.astype(np.float64))
            return np.tile(values, (1, angles.repeats))

        name = fresh_name(graph, f"rotary_{function.lower()}_table")
        return derive(name, [source], compute, shape)


def _find_angles(node: gs.Node) -> _Angles | None:
    """The parts of a Cos or Sin of integers times something; None if it is not that."""
    if not is_op(node, *_FUNCTIONS):
        return None
    angles, repeats = node.inputs[0], 1
    join = producer(angles)
    if join is not None and _is_repetition(join):
        angles, repeats = join.inputs[0], len(join.inputs)
    match = match_tensor(_ANGLES, angles)
    if match is None:
        return None
    turn, product = match.bound.get("turn"), match["product"]
    sides = [_views(match["left"]), _views(match["right"])]
    if turn is not None or (product.op == "Mul" and _is_integer(sides[1][0])):
        sides.reverse()
    if not _is_integer(sides[0][0]):
        return None
    return _Angles(sides[0], sides[1], product, turn, repeats)


def _is_repetition(join: gs.Node) -> bool:
    first = join.inputs[0] if join.inputs else None
    if not is_op(join, "Concat") or first is None or not first.shape:
        return False
    rank = len(first.shape)
    last = join.attrs["axis"] % rank == rank - 1
    return last and all(value is first for value in join.inputs)


def _views(tensor: gs.Tensor) -> list[gs.Tensor]:
    """A tensor's source and every view of it up to the tensor."""
    found = [tensor]
    while is_op(node := producer(found[0]), *_VIEWS):
        found.insert(0, node.inputs[0])
    return found


def _is_integer(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind == "i"


def _problem(node: gs.Node, angles: _Angles) -> str | None:
    frequencies, result = angles.frequencies[0], node.outputs[0]
    if not isinstance(frequencies, gs.Constant):
        made = producer(frequencies)
        by = f"computed by {describe(made)}" if made is not None else "an input of the graph"
        return f"the frequencies {frequencies.name!r} are {by}"
    floats = [*angles.frequencies, result]
    problem = _type_problem(angles.positions, _EXACT) or _type_problem(floats, _EXACT[-1:])
    if problem is not None:
        return problem
    half = int(np.prod(frequencies.shape))
    for before, after in pairwise(angles.frequencies):
        if is_op(producer(after), "Expand") and not _repeats_rows(before, after, half):
            return f"{after.name!r} repeats numbers of {before.name!r}, not the row of them"
    if not _is_outer(angles, half) or result.shape[-1] != half * angles.repeats:
        return f"{describe(angles.product)} is not each position times each of {half} numbers"
    if _unit_axes(angles.positions[0].shape, result.shape) is None:
        return f"{result.name!r} is {result.shape}, not a row for each position"
    return None


def _is_outer(angles: _Angles, half: int) -> bool:
    """Whether the product is of [..., S, 1] and [..., 1, half], or turned so."""
    column, row = list(angles.positions[-1].shape), list(angles.frequencies[-1].shape)
    if angles.turn is not None:
        order = list(range(len(angles.turn.inputs[0].shape or [])))
        swapped = [*order[:-2], *order[:-3:-1]]
        if angles.turn.attrs.get("perm", order[::-1]) != swapped:
            return False
        column, row = [*column[:-2], *column[:-3:-1]], [*row[:-2], *row[:-3:-1]]
    if angles.product.op == "MatMul" and (len(row) < 2 or row[-2] != 1):
        return False
    return bool(column and row) and column[-1] == 1 and row[-1] == half


def _type_problem(tensors: Sequence[gs.Tensor], dtypes: Sequence[type]) -> str | None:
    for tensor in tensors:
        if tensor.dtype is None or np.dtype(tensor.dtype) not in dtypes:
            return f"{tensor.name!r} is {tensor.dtype}, the angles are not float32 throughout"
        if tensor.shape is None:
            return f"the shape of {tensor.name!r} is not known"
    return None


def _repeats_rows(before: gs.Tensor, after: gs.Tensor, count: int) -> bool:
    """Whether an Expand keeps ``count`` numbers side by side: its last axes hold them all."""
    held = 1
    for old, new in zip(reversed(before.shape), reversed(after.shape), strict=False):
        if held == count or old != new or not isinstance(old, int):
            break
        held *= old
    return held == count


def _unit_axes(positions: list[int | str], result: list[int | str]) -> list[int] | None:
    """Axes of 1 that [*positions, D] lacks to be shaped as ``result``; None if it cannot."""
    axes, pending = [], list(positions)
    for axis, size in enumerate(result[:-1]):
        if pending and pending[0] == size:
            pending.pop(0)
        elif size == 1:
            axes.append(axis)
        else:
            return None
    return None if pending else axes


def _look_up(graph: gs.Graph, node: gs.Node, table: gs.Constant, positions: gs.Tensor) -> None:
    result = node.outputs[0]
    axes = _unit_axes(positions.shape, result.shape)
    shape = [*positions.shape, table.shape[-1]]
    rows = insert_node(
        graph, "Gather", [table, positions], result, shape=shape, attrs={"axis": 0},
        stem=f"{result.name}_rows",
    )  # fmt: skip
    if axes:
        rows = insert_node(graph, "Unsqueeze", [rows, np.array(axes, np.int64)], result)
    replace_tensor(graph, result, rows)
    unlink(node)
