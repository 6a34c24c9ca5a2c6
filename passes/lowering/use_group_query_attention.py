"""Rotary embedding, cache and attention in one operator of ONNX Runtime.

    output, present_key, present_value = com.microsoft.GroupQueryAttention(
        q, k, v [1, S, heads * D], past_key, past_value [1, H_kv, C, D],
        seqlens_k = T + S - 1, total_sequence_length = T + S, cos, sin [C, D / 2])

It rotates q and k by halves, x * cos + [-x2, x1] * sin, at positions T to T + S - 1, writes k
and v behind the T filled rows of the cache, in place if past and present share memory, and
attends causally to the T + S filled rows alone. The captured tables hold each angle twice (D
columns, two equal halves, or the sine's first half negated where the sign was folded into it);
the operator takes the second half. Where q, k and v are the three parts of one product, in
this order, it takes the product itself, [1, S, (H + 2 H_kv) * D], and the Split goes.

Semantics and limits: ContribOperators.md of ONNX Runtime, and its CPU kernel, which takes D in
multiples of 16, float and float16, and S > 1 with T > 0 for a batch of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mvlm_export.engines.targets import ORT_DOMAIN

from ..deferred import Array, derive, values_of
from ..editing import fresh_name, insert_node, producer, replace_tensor
from ..matching import Match, any_, cast, match_tensor, one_of, op
from .decoder_attention import AttentionBlock, is_positions
from .fixed_cache import FixedCachePass, make_present

HEAD_MULTIPLE = 16
"""ONNX Runtime's kernel takes a head_dim in multiples of this."""

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))
_COS = cast(op("Unsqueeze", cast(op("Gather", any_("cos"), any_("cos_rows"))), any_()))
_SIN = cast(op("Unsqueeze", cast(op("Gather", any_("sin"), any_("sin_rows"))), any_()))
_FIRST = op("Split", any_("x"), bind="split", output=0)
_SECOND = op("Split", any_("x"), bind="split", output=1)
_TURNED = op(
    "Concat",
    one_of(op("Neg", _SECOND, bind="negation"), _SECOND),
    _FIRST,
    bind="turn",
    exact=True,
)
_ROTARY = op("Add", op("Mul", any_("x"), _COS), op("Mul", _TURNED, _SIN))


@dataclass(frozen=True)
class _Rotation:
    """What rotates a query or key.

    Attributes:
        source: what is rotated, [S, H, D].
        cos, sin: tables, one row a position, D columns.
        negated: the sine's table carries the sign.
    """

    source: gs.Variable
    cos: gs.Constant
    sin: gs.Constant
    negated: bool


class UseGroupQueryAttention(FixedCachePass):
    """Append form to the fixed form of ONNX Runtime.

    Args:
        capacity: C, rows of each cache tensor.
    """

    name = "use-group-query-attention"
    summary = "rotary embedding, cache and attention become ONNX Runtime's one operator"
    opsets = range(18, 25)

    def block_problem(self, graph: gs.Graph, block: AttentionBlock) -> str | None:
        *_, head_dim = block.heads
        if head_dim % HEAD_MULTIPLE:
            return f"head_dim is {head_dim}, ONNX Runtime takes multiples of {HEAD_MULTIPLE}"
        if block.query.dtype not in _FLOATS:
            return f"{block.query.name!r} is {block.query.dtype}"
        if block.scale == 0:
            return f"the scores of {block.query.name!r} are scaled by 0, which means unset"
        query, key = (_find_rotation(tensor) for tensor in (block.query, block.rows[0]))
        if isinstance(query, str):
            return query
        if isinstance(key, str):
            return key
        if query.cos is not key.cos or query.sin is not key.sin:
            return f"{block.query.name!r} and {block.rows[0].name!r} have other angles"
        if query.negated != key.negated:
            names = f"{block.query.name!r} and {block.rows[0].name!r}"
            return f"{names} are turned in opposite directions by {query.sin.name!r}"
        return self._table_problem(query)

    def _table_problem(self, rotation: _Rotation) -> str | None:
        for table, sign in ((rotation.cos, 1), (rotation.sin, -1 if rotation.negated else 1)):
            rows, columns = table.shape
            if rows < self.capacity:
                return f"the table {table.name!r} has {rows} rows for {self.capacity}"
            values = values_of(table)
            half = columns // 2
            if not np.array_equal(values[:, :half], sign * values[:, half:]):
                return f"the halves of the table {table.name!r} differ"
        return None

    def rewrite(
        self, graph: gs.Graph, blocks: list[AttentionBlock], length: gs.Variable
    ) -> None:
        lengths = _lengths(graph, blocks[0], length)
        tables: dict[tuple[int, int], list[gs.Constant]] = {}
        for block in blocks:
            query, key = (_find_rotation(t) for t in (block.query, block.rows[0]))
            assert isinstance(query, _Rotation)
            assert isinstance(key, _Rotation)
            pair = id(query.cos), id(query.sin)
            if pair not in tables:
                sources = (query.cos, query.sin)
                tables[pair] = [_half_table(graph, t, block.query.dtype) for t in sources]
            operands = [query.source, key.source, block.rows[1]]
            self._replace(graph, block, operands, [*lengths, *tables[pair]])

    def _replace(
        self,
        graph: gs.Graph,
        block: AttentionBlock,
        operands: list[gs.Variable],
        parameters: list[gs.Tensor],
    ) -> None:
        heads, kv_heads, head_dim = block.heads
        whole = _split_source(operands)
        flat: list[gs.Tensor] = [gs.Variable.empty(), gs.Variable.empty()]
        if whole is not None:
            flat.insert(0, _in_rows(graph, whole, (heads + 2 * kv_heads) * head_dim))
        else:
            flat = [_in_rows(graph, t, t.shape[1] * head_dim) for t in operands]
        presents = [make_present(graph, rows, self.capacity) for rows in block.rows]
        name = fresh_name(graph, "group_query_attention")
        shape = [1, block.query.shape[0], heads * head_dim]
        output = gs.Variable(name, block.query.dtype, shape)
        attrs: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": kv_heads}
        attrs |= {"do_rotary": 1, "scale": block.scale}
        inputs = [*flat, *block.pasts, *parameters]
        outputs = [output, *presents]
        node = gs.Node("GroupQueryAttention", name, attrs, inputs, outputs, domain=ORT_DOMAIN)
        graph.nodes.append(node)
        by_head = [output, np.array([-1, heads, head_dim])]
        attended = insert_node(graph, "Reshape", by_head, block.match.root)
        replace_tensor(graph, block.match.root, attended)

    def _written(self, cache: Array, rows: Array, filled: int) -> Array:
        # The operator clears what lies behind when past and present are not the same memory.
        written = super()._written(cache, rows, filled)
        written[0, :, filled + len(rows) :] = 0
        return written


def _in_rows(graph: gs.Graph, tensor: gs.Variable, width: int) -> gs.Variable:
    """Rows [S, ...] as [1, S, width]."""
    return insert_node(graph, "Reshape", [tensor, np.array([1, -1, width])])


def _split_source(operands: list[gs.Variable]) -> gs.Variable | None:
    """What query, key and value [S, heads, D] are the parts of, if they are all of it."""
    parts = []
    for tensor in operands:
        node = producer(tensor)
        if node is None or node.op != "Reshape" or len(node.inputs[0].shape or ()) != 2:
            return None
        parts.append(node.inputs[0])
    split = producer(parts[0])
    if split is None or split.op != "Split" or split.attrs.get("axis", 0) not in (-1, 1):
        return None
    in_order = [id(part) for part in split.outputs] == [id(part) for part in parts]
    return split.inputs[0] if in_order else None


def _find_rotation(tensor: gs.Variable) -> _Rotation | str:
    what = f"{tensor.name!r} is not rotated"
    match = match_tensor(_ROTARY, tensor)
    if match is None:
        return f"{what} by a rotary embedding of halves"
    problem = _split_problem(match)
    if problem is not None:
        return f"{what} by halves: {problem}"
    if not (is_positions(match["cos_rows"]) and is_positions(match["sin_rows"])):
        return f"{what} by its position from row T on"
    cos, sin = match["cos"], match["sin"]
    if not (isinstance(cos, gs.Constant) and isinstance(sin, gs.Constant)):
        return f"{what} by constant tables"
    return _Rotation(match["x"], cos, sin, "negation" not in match)


def _split_problem(match: Match) -> str | None:
    split, turn = match["split"], match["turn"]
    width = match["x"].shape[-1]
    if len(split.outputs) != 2 or split.outputs[0].shape[-1] * 2 != width:
        return f"{split.name!r} does not halve {width} columns"
    if turn.attrs["axis"] not in (-1, 2):
        return f"{turn.name!r} does not join columns"
    return None


def _half_table(
    graph: gs.Graph, table: gs.Constant, dtype: np.dtype[np.generic]
) -> gs.Constant:
    rows, columns = table.shape
    half = columns // 2

    def second_half(values: Array) -> Array:
        return np.ascontiguousarray(values[:, half:])

    name = fresh_name(graph, f"{table.name}.half")
    return derive(name, [table], second_half, [rows, half], dtype)


def _lengths(graph: gs.Graph, block: AttentionBlock, length: gs.Variable) -> list[gs.Variable]:
    """``seqlens_k`` int32 [1] and ``total_sequence_length`` int32 []."""
    to_int32 = {"to": int(onnx.TensorProto.INT32)}
    new = insert_node(
        graph, "Shape", [block.positions], attrs={"start": 0, "end": 1}, stem="new_length"
    )
    rows = insert_node(graph, "Add", [length, new], stem="filled_length")
    total = insert_node(graph, "Cast", [rows], attrs=to_int32, stem="filled_length_int32")
    last = insert_node(graph, "Sub", [total, np.array([1], np.int32)], stem="seqlens_k")
    scalar = insert_node(
        graph, "Squeeze", [total, np.array([0])], stem="total_sequence_length"
    )
    return [last, scalar]
