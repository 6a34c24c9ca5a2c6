"""Remove casts that change nothing.

    Cast(Cast(x, wide), d) = Cast(x, d)      where every value of x's dtype is one of ``wide``
    Cast(Cast(x, wide), dtype of x) = x      the same, there and back
    Cast(x, dtype of x) = x
    Cast(x, d), Cast(x, d)                   one will do
    Cast(move(Cast(x, wide)), dtype of x) = move(x)

``move`` is any piece of the graph made of operators that only move values (Reshape, Transpose,
Split, Concat ...), with nothing but such casts at its inputs and outputs. A cast that narrows
rounds, and is part of the result: Cast(Cast(x, narrow), dtype of x) stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally, numpy_dtype
from ..editing import (
    consumers,
    is_graph_output,
    live_nodes,
    producer,
    replace_tensor,
    unlink,
)
from ..matching import describe, is_foreign
from .bypass import bypass
from .op_kinds import LAYOUT_OPS, moved_inputs

_NUMBERS = "biufV"
"""Kinds of dtypes; V are those that numpy lacks, such as bfloat16."""


class RemoveCastIslands(Pass):
    """Casts there and back, casts twice, and casts around mere moves."""

    name = "remove-cast-islands"
    summary = "casts that change nothing go: there and back, twice, around mere moves"

    def run(self, graph: gs.Graph) -> PassResult:
        rewritten = 0
        while True:
            tally = Tally()
            for node in live_nodes(graph):
                if node.op == "Cast" and not is_foreign(node):
                    _visit(graph, node, tally)
            result = tally.result()
            rewritten += result.rewritten
            if not result.rewritten:
                refused = result.refusals
                return PassResult(rewritten + len(refused), rewritten, refused)


def is_lossless(source: Any, target: Any) -> bool:  # noqa: ANN401
    """Whether every value of one dtype is one of the other."""
    source, target = np.dtype(source), np.dtype(target)
    if source.kind not in _NUMBERS or target.kind not in _NUMBERS:
        return False  # numpy calls every dtype to a string safe, which has few digits
    if source.kind in "iu" and source.itemsize == 8 and target.kind != source.kind:
        return False  # numpy calls int64 to float64 safe, which has 53 bits
    return bool(np.can_cast(source, target, "safe"))


def _visit(graph: gs.Graph, node: gs.Node, tally: Tally) -> None:
    """Try each rule on a Cast; the first that has something to say ends it."""
    if node.inputs[0].dtype is None or node.outputs[0].dtype is None:
        return
    for rule in (_idle, _repeated, _chained, _around_moves):
        found = rule(graph, node)
        if isinstance(found, str):
            tally.refuse(node, found)
        if found:
            if not isinstance(found, str):
                tally.rewrote(found)
            return


def _idle(graph: gs.Graph, node: gs.Node) -> int | str:
    """Read past a Cast to the dtype that is there."""
    if numpy_dtype(node.inputs[0]) != numpy_dtype(node.outputs[0]):
        return 0
    return bypass(graph, node, node.inputs[0]) or 1


def _repeated(graph: gs.Graph, node: gs.Node) -> int:
    """Let readers of another Cast of the same tensor to the same dtype read this one."""
    result = node.outputs[0]
    for other in consumers(node.inputs[0]):
        twin = other.outputs[0] if other.op == "Cast" and other is not node else None
        if twin is None or twin.dtype is None or numpy_dtype(twin) != numpy_dtype(result):
            continue
        if not is_graph_output(graph, twin):
            replace_tensor(graph, twin, result)
            unlink(other)
            return 1
    return 0


def _chained(graph: gs.Graph, node: gs.Node) -> int | str:
    """Read across a Cast that lost nothing."""
    before = producer(node.inputs[0])
    if before is None or before.op != "Cast" or is_foreign(before):
        return 0
    x, result = before.inputs[0], node.outputs[0]
    if x.dtype is None:
        return 0
    source, middle, target = (numpy_dtype(t) for t in (x, node.inputs[0], result))
    if not is_lossless(source, middle):
        rounded = f"{before.outputs[0].name!r} is rounded to {np.dtype(middle)}"
        return f"{rounded}, which is part of the result" if source == target else 0
    if source != target:
        if np.dtype(target).kind not in "biuf":
            return 0
        node.inputs[0] = x
        return 1
    return bypass(graph, node, x) or 1


@dataclass(frozen=True)
class _Moves:
    """A connected piece of layout operators: its nodes, and the casts at its borders."""

    nodes: list[gs.Node]
    entries: list[gs.Tensor]
    exits: list[gs.Node]
    other: str | None
    """What else than a cast stands at its border."""


def _around_moves(graph: gs.Graph, node: gs.Node) -> int | str:
    """Move narrow values instead of widening, moving and narrowing them."""
    narrow, wide = numpy_dtype(node.outputs[0]), numpy_dtype(node.inputs[0])
    start = producer(node.inputs[0])
    if start is None or not _is_move(start) or not is_lossless(narrow, wide):
        return 0
    moves = _collect(graph, start)
    ups = [producer(tensor) for tensor in moves.entries]
    if not any(up is not None and _is_cast_from(up, narrow) for up in ups):
        return 0
    for tensor, up in zip(moves.entries, ups, strict=True):
        if up is None or not _is_cast_from(up, narrow):
            return f"{tensor.name!r}, which is moved along, is no Cast from {np.dtype(narrow)}"
    for down in moves.exits:
        if numpy_dtype(down.outputs[0]) != narrow:
            return f"{describe(down)} takes what is moved as {np.dtype(wide)}"
    problem = moves.other or _output_problem(graph, moves.exits)
    if problem is not None:
        return problem
    _narrow(graph, moves, narrow)
    return len(moves.exits)


def _is_move(node: gs.Node) -> bool:
    return node.op in LAYOUT_OPS and not is_foreign(node)


def _is_cast_from(node: gs.Node, dtype: Any) -> bool:  # noqa: ANN401
    source = node.inputs[0].dtype if node.op == "Cast" else None
    return source is not None and numpy_dtype(node.inputs[0]) == dtype


def _collect(graph: gs.Graph, start: gs.Node) -> _Moves:
    moves = _Moves([], [], [], None)
    other: list[str] = []
    pending, seen = [start], {id(start)}
    while pending:
        node = pending.pop()
        moves.nodes.append(node)
        near: list[gs.Node] = []
        for index in moved_inputs(node):
            made = producer(node.inputs[index])
            if made is not None and _is_move(made):
                near.append(made)
            else:
                moves.entries.append(node.inputs[index])
        for tensor in node.outputs:
            if is_graph_output(graph, tensor):
                other.append(f"{tensor.name!r}, which is moved, is an output of the graph")
            for reader in consumers(tensor):
                if _is_move(reader) and _only_moves(reader, tensor):
                    near.append(reader)
                elif reader.op == "Cast":
                    moves.exits.append(reader)
                else:
                    other.append(f"{tensor.name!r} is also read by {describe(reader)}")
        for neighbour in near:
            if id(neighbour) not in seen:
                seen.add(id(neighbour))
                pending.append(neighbour)
    return _Moves(moves.nodes, moves.entries, moves.exits, other[0] if other else None)


def _only_moves(node: gs.Node, tensor: gs.Tensor) -> bool:
    moved = moved_inputs(node)
    return all(index in moved for index, t in enumerate(node.inputs) if t is tensor)


def _output_problem(graph: gs.Graph, exits: list[gs.Node]) -> str | None:
    """Why the tensors that are moved cannot take over the names of outputs of the graph."""
    taken: dict[int, gs.Tensor] = {}
    for down in exits:
        result = down.outputs[0]
        if is_graph_output(graph, result):
            first = taken.setdefault(id(down.inputs[0]), result)
            if first is not result:
                return f"{first.name!r} and {result.name!r} are both outputs of the graph"
    return None


def _narrow(graph: gs.Graph, moves: _Moves, dtype: Any) -> None:  # noqa: ANN401
    for node in moves.nodes:
        for index in moved_inputs(node):
            made = producer(node.inputs[index])
            if made is not None and made.op == "Cast":
                node.inputs[index] = made.inputs[0]
        for tensor in node.outputs:
            tensor.dtype = dtype
    for down in moves.exits:
        bypass(graph, down, down.inputs[0])
