"""Multiply-accumulates of a graph, for given values of its dynamic axes.

One multiply-accumulate is one product added to a sum: a MatMul of [M, K] with [K, N] has
``M * K * N`` of them. Counted are products of matrices, convolutions and attention; what is
element by element is not. Attention is counted as it is computed without a mask: a causal one
needs about half. A node that cannot be counted is named with the reason; it is never a zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx

from .bound_shapes import (
    LIKE_FIRST_INPUT,
    Axes,
    Shape,
    attribute,
    bound_shapes,
    graph_inputs,
    is_standard,
    shape_of,
)

_Sizes = tuple[int, ...]

CACHED = "T"
"""Tokens in the cache: an axis of the append form, a number given to the fixed form."""

PAST_LENGTH = "past_length"
"""The input that gives it."""


@dataclass(frozen=True)
class Uncounted:
    """A node whose multiply-accumulates are not known."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one run.

    Attributes:
        axes: values of the dynamic axes they hold for.
        total: of all nodes that could be counted.
        by_operator: the same by operator, largest first.
        uncounted: nodes that are missing in ``total``.
    """

    axes: Mapping[str, int]
    total: int
    by_operator: Mapping[str, int] = field(default_factory=dict)
    uncounted: tuple[Uncounted, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class _Unknown(Exception):  # noqa: N818
    """A shape that the count needs is open; the message is the reason."""


class _Operands:
    """Shapes of a node's operands, each a tuple of numbers when asked for."""

    def __init__(self, node: onnx.NodeProto, shapes: Mapping[str, Shape], axes: Axes) -> None:
        self.node = node
        self.axes = axes
        self._shapes = shapes

    def has_input(self, index: int) -> bool:
        return len(self.node.input) > index and bool(self.node.input[index])

    def input(self, index: int) -> _Sizes:
        return self._sizes(self.node.input[index])

    def output(self, index: int = 0) -> _Sizes:
        return self._sizes(self.node.output[index])

    def _sizes(self, name: str) -> _Sizes:
        shape = self._shapes.get(name)
        if shape is None:
            raise _Unknown(f"the shape of {name!r} is not known")
        sizes = []
        for axis in shape:
            if not isinstance(axis, int):
                text = f"axis {axis!r}" if axis else "an axis"
                raise _Unknown(f"{text} of {name!r} has no value")
            sizes.append(axis)
        return tuple(sizes)


def _matmul(operands: _Operands) -> int:
    return math.prod(operands.output()) * operands.input(0)[-1]


def _gemm(operands: _Operands) -> int:
    transposed = attribute(operands.node, "transA", 0)
    return math.prod(operands.output()) * operands.input(0)[0 if transposed else 1]


def _conv(operands: _Operands, weight: int = 1) -> int:
    """Each output value sums over the kernel and the channels of its group."""
    return math.prod(operands.output()) * math.prod(operands.input(weight)[1:])


def _conv_transpose(operands: _Operands) -> int:
    """Each input value is spread over the kernel and the output channels of its group."""
    return math.prod(operands.input(0)) * math.prod(operands.input(1)[1:])


def _matmul_nbits(operands: _Operands) -> int:
    rows = math.prod(operands.input(0)[:-1])
    return rows * attribute(operands.node, "K", 0) * attribute(operands.node, "N", 0)


def _attention(operands: _Operands) -> int:
    """ONNX's Attention: ``Q K^T`` and the product with V, over past and new tokens.

    Behind a TensorScatter these are all rows of the cache, filled or not.
    """
    node, query = operands.node, operands.input(0)
    heads = attribute(node, "q_num_heads", 0) if len(query) == 3 else query[1]
    kv_heads = attribute(node, "kv_num_heads", heads)
    (_, length, key_width), (_, _, value_width) = (
        _rows(operands.input(index), kv_heads) for index in (1, 2)
    )
    if operands.has_input(4):
        length += operands.input(4)[2]
    return query[0] * heads * query[-2] * length * (key_width + value_width)


def _rows(shape: _Sizes, heads: int) -> _Sizes:
    """(heads, tokens, width of a head) of [B, heads, tokens, width] or [B, tokens, all]."""
    if len(shape) == 4:
        return shape[1:]
    return heads, shape[1], shape[2] // max(heads, 1)


def _group_query_attention(operands: _Operands) -> int:
    """ONNX Runtime's: queries [B, S, heads * width], perhaps packed with keys and values.

    It works on the filled rows of its cache alone: ``T`` of them where that axis has a value,
    all where it has none.
    """
    node, (batch, tokens, width) = operands.node, operands.input(0)
    heads, kv_heads = attribute(node, "num_heads", 0), attribute(node, "kv_num_heads", 0)
    packed = not operands.has_input(1)
    head_width = width // max(heads + 2 * kv_heads if packed else heads, 1)
    past = operands.input(3)[2] if operands.has_input(3) else 0
    past = min(past, operands.axes.get(CACHED, past))
    return 2 * batch * heads * tokens * (past + tokens) * head_width


_RULES: dict[str, Callable[[_Operands], int]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": lambda operands: _conv(operands, 3),
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
}
_FOREIGN_RULES: dict[str, Callable[[_Operands], int]] = {
    "MatMulIntegerToFloat": _matmul,
    "MatMulNBits": _matmul_nbits,
    "GroupQueryAttention": _group_query_attention,
}
_NO_RULE = frozenset({"DeformConv", "Einsum", "GRU", "LSTM", "RNN"})
_NESTED = frozenset({"If", "Loop", "Scan", "SequenceMap"})


def count_macs(model: onnx.ModelProto, axes: Axes) -> MacCount:
    """Multiply-accumulates of a model; its weights are not needed.

    Args:
        axes: values of dynamic axes by name; those that the model lacks are ignored.
    """
    shapes = bound_shapes(model, axes)
    counts: dict[str, int] = {}
    uncounted = []
    for node in model.graph.node:
        try:
            count = _count(node, shapes, axes)
        except _Unknown as unknown:
            name = node.name or next(iter(node.output), "")
            uncounted.append(Uncounted(name, operator_name(node), str(unknown)))
        else:
            if count is not None:
                key = operator_name(node)
                counts[key] = counts.get(key, 0) + count
    ordered = dict(sorted(counts.items(), key=lambda item: -item[1]))
    names = dynamic_axes(model)
    used = {name: axes[name] for name in names if name in axes}
    return MacCount(used, sum(counts.values()), ordered, tuple(uncounted))


def _count(node: onnx.NodeProto, shapes: Mapping[str, Shape], axes: Axes) -> int | None:
    """A node's multiply-accumulates; None for an operator that has none."""
    standard = is_standard(node)
    rule = (_RULES if standard else _FOREIGN_RULES).get(node.op_type)
    if rule is not None:
        try:
            return rule(_Operands(node, shapes, axes))
        except (IndexError, ValueError) as error:
            raise _Unknown("its operands are not of the rank that it takes") from error
    if node.op_type in _NESTED:
        raise _Unknown("it runs a graph of its own")
    if standard and node.op_type in _NO_RULE:
        raise _Unknown("there is no rule for this operator")
    if not standard and node.op_type not in LIKE_FIRST_INPUT:
        raise _Unknown(f"the operator is not one of ONNX (domain {node.domain!r})")
    return None


def operator_name(node: onnx.NodeProto) -> str:
    """``MatMul``, or with its domain ``com.microsoft.MatMulNBits``."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def dynamic_axes(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the axes that the caller's inputs decide, in their order.

    A decoder with a fixed cache is told how many rows of it are filled: that counts as ``T``.
    """
    names = [
        axis
        for value in graph_inputs(model.graph)
        for axis in shape_of(value) or ()
        if isinstance(axis, str)
    ]
    if any(value.name == PAST_LENGTH for value in graph_inputs(model.graph)):
        names.append(CACHED)
    return tuple(dict.fromkeys(names))
