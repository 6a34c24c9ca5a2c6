"""Linear layers that read one tensor, made one layer with a Split behind it.

    x W_1, x W_2, ... = split(x [W_1 | W_2 | ...]),

exactly: every column keeps its own dot product. The same holds for weights that
DequantizeLinear makes of integers, when the blocks run along the rows or the scales go by
column: integers, scales and zero points are joined alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from ..deferred import Array, derive
from ..editing import consumers, fresh_name, is_graph_output, producer, unlink
from ..matching import constant_problem, describe, is_op
from .linear_layers import bias_add, bias_of


def _merge_problem(graph: gs.Graph, matmuls: Sequence[gs.Node]) -> str | None:
    for matmul in matmuls:
        problem = _weight_problem(graph, matmul)
        if problem is not None:
            return problem
    first = matmuls[0]
    for other in matmuls[1:]:
        problem = _difference(first, other)
        if problem is not None:
            return problem
    plain = [matmul for matmul in matmuls if bias_add(graph, matmul) is None]
    if plain and len(plain) < len(matmuls):
        return f"{describe(plain[0])} has no constant bias of its own, as others have"
    return None


def _weight_problem(graph: gs.Graph, matmul: gs.Node) -> str | None:
    weight = matmul.inputs[1]
    quantizer = _quantizer(matmul)
    if quantizer is None:
        problem = constant_problem(graph, weight, matmul)
        if problem is None and len(weight.shape) != 2:
            problem = f"the weight {weight.name!r} has {len(weight.shape)} axes, not 2"
        return problem
    if is_graph_output(graph, weight) or len(consumers(weight)) > 1:
        return f"the weight {weight.name!r} is read elsewhere"
    for tensor in quantizer.inputs:
        problem = constant_problem(graph, tensor, quantizer)
        if problem is not None:
            return problem
    return _layout_problem(quantizer)


def _quantizer(matmul: gs.Node) -> gs.Node | None:
    """The DequantizeLinear that makes a MatMul's weight, if one does."""
    node = producer(matmul.inputs[1])
    return node if is_op(node, "DequantizeLinear") else None


def _width(matmul: gs.Node) -> int:
    quantizer = _quantizer(matmul)
    weight = matmul.inputs[1] if quantizer is None else quantizer.inputs[0]
    return int(weight.shape[-1])


def _layout_problem(quantizer: gs.Node) -> str | None:
    """Why scales and zero points cannot be joined by columns; None if they can."""
    values, scale = quantizer.inputs[:2]
    if len(values.shape) != 2:
        return f"the weight {values.name!r} has {len(values.shape)} axes, not 2"
    rows_in_blocks = len(scale.shape) == 2 and _axis(quantizer) == 0
    by_column = len(scale.shape) == 1 and _axis(quantizer) == 1
    if not (rows_in_blocks or by_column) or scale.shape[-1] != values.shape[1]:
        return f"the scales {scale.name!r} of {describe(quantizer)} do not go by column"
    return None


def _axis(quantizer: gs.Node) -> int:
    return int(quantizer.attrs.get("axis", 1)) % 2


def _difference(first: gs.Node, other: gs.Node) -> str | None:
    one, two = _quantizer(first), _quantizer(other)
    if (one is None) != (two is None):
        return f"of {describe(first)} and {describe(other)} only one is quantized"
    if one is not None and two is not None:
        return _quantized_difference(one, two)
    return _type_difference(first.inputs[1], other.inputs[1])


def _quantized_difference(one: gs.Node, two: gs.Node) -> str | None:
    if len(one.inputs) != len(two.inputs):
        return f"of {describe(one)} and {describe(two)} only one has zero points"
    if _axis(one) != _axis(two) or _settings(one) != _settings(two):
        return f"{describe(one)} and {describe(two)} have other axes, blocks or types"
    for left, right in zip(one.inputs, two.inputs, strict=True):
        problem = _type_difference(left, right)
        if problem is not None:
            return problem
    return None


def _settings(quantizer: gs.Node) -> dict[str, object]:
    return {key: value for key, value in quantizer.attrs.items() if key != "axis"}


def _type_difference(left: gs.Constant, right: gs.Constant) -> str | None:
    if np.dtype(left.dtype) != np.dtype(right.dtype):
        return f"{left.name!r} is {left.dtype}, {right.name!r} is {right.dtype}"
    if list(left.shape[:-1]) != list(right.shape[:-1]):
        return f"{left.name!r} is {list(left.shape)}, {right.name!r} is {list(right.shape)}"
    return None


@dataclass
class Merger:
    """Merges groups of linear layers in one graph.

    Attributes:
        graph: it works on.
        label: what is added to the names of weights, ``with_kv``.
    """

    graph: gs.Graph
    label: str
    _sizes: dict[tuple[int, ...], gs.Constant] = field(default_factory=dict)
    _merged: dict[int, str] = field(default_factory=dict)

    def problem(self, matmuls: Sequence[gs.Node]) -> str | None:
        """Why linear layers cannot become one; None if they can."""
        for matmul in matmuls:
            if id(matmul) in self._merged:
                return f"{self._merged[id(matmul)]!r} belongs to another merged layer"
        source = matmuls[0].inputs[0]
        for other in matmuls[1:]:
            if other.inputs[0] is not source:
                return f"{describe(other)} reads {other.inputs[0].name!r}, not {source.name!r}"
        return _merge_problem(self.graph, matmuls)

    def merge(self, matmuls: Sequence[gs.Node]) -> None:
        """Make one layer of those, their results in this order; see :meth:`problem`."""
        first, source = matmuls[0], matmuls[0].inputs[0]
        pairs = [(node.outputs[0], bias_add(self.graph, node)) for node in matmuls]
        adds = [add for _, add in pairs if add is not None]
        biases = [bias_of(add, result) for result, add in pairs if add is not None]
        results = [node.outputs[0] for node in adds or matmuls]
        widths = tuple(_width(matmul) for matmul in matmuls)
        weight = self._weight(matmuls)
        self._merged |= {id(node): node.outputs[0].name for node in matmuls}
        for node in (*matmuls, *adds):
            unlink(node)
        merged = self._append("MatMul", first.name, [source, weight], results[0])
        if biases:
            bias = self._join(biases, flat=True)
            merged = self._append("Add", adds[0].name, [merged, bias], results[0])
        # The old results stay, so that their readers and their names do too.
        inputs = [merged, self._split_sizes(widths)]
        name = f"{merged.name}.split"
        self.graph.nodes.append(gs.Node("Split", name, {"axis": -1}, inputs, results))

    def _weight(self, matmuls: Sequence[gs.Node]) -> gs.Tensor:
        quantizers = [node for node in map(_quantizer, matmuls) if node is not None]
        if not quantizers:
            return self._join([matmul.inputs[1] for matmul in matmuls])
        columns = zip(*(node.inputs for node in quantizers), strict=True)
        inputs = [self._join(column) for column in columns]
        first = matmuls[0].inputs[1]
        name = fresh_name(self.graph, f"{first.name}.{self.label}")
        weight = gs.Variable(name, first.dtype, list(inputs[0].shape))
        attrs = dict(quantizers[0].attrs)
        self.graph.nodes.append(gs.Node("DequantizeLinear", name, attrs, inputs, [weight]))
        return weight

    def _join(self, parts: Sequence[gs.Constant], flat: bool = False) -> gs.Constant:
        """Constants side by side along their last axis."""
        width = sum(int(part.shape[-1]) for part in parts)
        shape = (width,) if flat else (*parts[0].shape[:-1], width)

        def join(*arrays: Array) -> Array:
            if flat:
                arrays = tuple(array.reshape(-1) for array in arrays)
            joined: Array = np.concatenate(arrays, axis=-1)
            return joined

        name = fresh_name(self.graph, f"{parts[0].name}.{self.label}")
        return derive(name, parts, join, shape)

    def _append(
        self, op: str, name: str, inputs: list[gs.Tensor], part: gs.Tensor
    ) -> gs.Variable:
        """A node whose result is like ``part``, but as wide as its second input."""
        taken = [tensor.name for tensor in inputs]
        name = fresh_name(self.graph, f"{name or part.name}.{self.label}", taken)
        shape = None if part.shape is None else [*part.shape[:-1], inputs[1].shape[-1]]
        result = gs.Variable(name, part.dtype, shape)
        self.graph.nodes.append(gs.Node(op, name, {}, inputs, [result]))
        return result

    def _split_sizes(self, widths: tuple[int, ...]) -> gs.Constant:
        if widths not in self._sizes:
            name = fresh_name(self.graph, "split_" + "_".join(map(str, widths)))
            self._sizes[widths] = gs.Constant(name, np.array(widths, np.int64))
        return self._sizes[widths]
