"""Every shape of a model as numbers, for given values of its dynamic axes.

The graph's structure is copied without its weights, the inputs get the values, and ONNX's own
inference does the rest. Operators that ONNX does not know (com.microsoft) are replaced in the
copy by a standard one of the same output shape; where inference gives up, the recorded shapes
(``T + S``) are used with the values put in.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import onnx

from mvlm_export.engines.errors import PassError

SHAPE_DATA = 1024
"""Constants of at most so many bytes are kept: inference reads shapes out of them."""

MOST_ELEMENTS = 2**63 - 1
"""Of a tensor: ONNX's inference counts in 64 bits, and goes on with a wrong number."""

Axes = Mapping[str, int]
"""Values of dynamic axes by name."""

Shape: TypeAlias = "tuple[int | str | None, ...]"
"""An axis is a number, the name of a dynamic axis, or None if nothing is known."""

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
LIKE_FIRST_INPUT = frozenset(
    {
        "BiasGelu",
        "FastGelu",
        "GroupQueryAttention",
        "LayerNormalization",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""Operators of ONNX Runtime whose first output has the shape of their first input."""

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate_axis(text: str, axes: Axes) -> int | None:
    """The value of an axis such as ``S`` or ``T + S``; None if a name has no value.

    >>> evaluate_axis("T + S", {"T": 3, "S": 1})
    4
    """
    if text in axes:
        return axes[text]
    try:
        return _evaluate(ast.parse(text, mode="eval").body, axes)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(tree: ast.expr, axes: Axes) -> int | None:
    if isinstance(tree, ast.Constant) and type(tree.value) is int:
        return tree.value
    if isinstance(tree, ast.Name):
        return axes.get(tree.id)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _ARITHMETIC:
        left, right = _evaluate(tree.left, axes), _evaluate(tree.right, axes)
        if left is not None and right is not None:
            return _ARITHMETIC[type(tree.op)](left, right)
    return None


def shape_of(value: onnx.ValueInfoProto) -> Shape | None:
    """What is recorded of a tensor's shape; None if not even its rank is.

    A negative number, as some tools write for a dynamic axis, says nothing.
    """
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if _has_size(dim) else dim.dim_param or None for dim in kind.shape.dim
    )


def _has_size(dim: onnx.TensorShapeProto.Dimension) -> bool:
    return dim.HasField("dim_value") and dim.dim_value >= 0


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether ONNX itself defines a node's operator."""
    return node.domain in STANDARD_DOMAINS and onnx.defs.has(node.op_type)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((item.i for item in node.attribute if item.name == name), default)


def graph_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """What the caller gives; old models list their initializers among the inputs."""
    stored = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in stored]


def bound_shapes(model: onnx.ModelProto, axes: Axes) -> dict[str, Shape]:
    """Shapes of all tensors, constants included, with the dynamic axes bound.

    Axes that the model lacks are ignored; those without a value stay names.

    Raises:
        PassError: ONNX's inference fails, or a tensor is too large for the values.
    """
    structure = _structure(model, axes)
    known = _infer(structure)
    _check_sizes(model, known, axes)
    hints = [value for value in _recorded(model, axes) if _is_open(known.get(value.name))]
    if hints:
        structure.graph.value_info.extend(hints)
        # A recorded shape is a hint: what inference finds by itself comes first.
        known = _infer(structure) | {k: v for k, v in known.items() if not _is_open(v)}
        _check_sizes(model, known, axes)
    return known


def _check_sizes(model: onnx.ModelProto, shapes: Mapping[str, Shape], axes: Axes) -> None:
    for name, shape in shapes.items():
        if math.prod(axis for axis in shape if isinstance(axis, int)) > MOST_ELEMENTS:
            raise _too_large(model, name, axes)


def _too_large(model: onnx.ModelProto, name: str, axes: Axes) -> PassError:
    used = {axis for value in model.graph.input for axis in shape_of(value) or ()}
    values = ", ".join(f"{axis}={size}" for axis, size in axes.items() if axis in used)
    return PassError(
        f"The tensor {name!r} of {model.graph.name or 'the graph'} has more than 2**63 "
        f"elements{f' for {values}' if values else ''}. "
        f"{'Set smaller values.' if values else 'Check the file with onnx.checker.'}"
    )


def _is_open(shape: Shape | None) -> bool:
    return shape is None or any(not isinstance(axis, int) for axis in shape)


def _infer(model: onnx.ModelProto) -> dict[str, Shape]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise PassError(
            f"The shapes of {model.graph.name or 'the graph'} cannot be inferred ({error}). "
            "Check the file with onnx.checker."
        ) from error
    known = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    shapes: dict[str, Shape] = dict(known)
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        shape = shape_of(value)
        if shape is not None:
            shapes.setdefault(value.name, shape)
    return shapes


def _structure(model: onnx.ModelProto, axes: Axes) -> onnx.ModelProto:
    """The model without its weights, inputs bound, outputs open, all operators standard."""
    copy = onnx.ModelProto(ir_version=model.ir_version)
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    graph = copy.graph
    graph.name = model.graph.name
    for tensor in model.graph.initializer:
        _add_stand_in(graph, tensor)
    for node in model.graph.node:
        graph.node.extend(_standard_forms(graph, node))
    graph.input.extend(_bound(model, value, axes) for value in model.graph.input)
    for value in model.graph.output:
        opened = graph.output.add(name=value.name)
        opened.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return copy


def _add_stand_in(graph: onnx.GraphProto, tensor: onnx.TensorProto) -> None:
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not external and tensor.ByteSize() <= SHAPE_DATA:
        graph.initializer.append(tensor)
        return
    stand_in = graph.initializer.add(name=tensor.name, data_type=tensor.data_type)
    stand_in.dims.extend(tensor.dims)
    stand_in.data_location = onnx.TensorProto.EXTERNAL
    stand_in.external_data.add(key="location", value="left-out")


def _standard_forms(graph: onnx.GraphProto, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    if is_standard(node):
        yield node
    elif node.op_type == "MatMulNBits" and node.input and node.output:
        weight = f"{node.output[0]}.unpacked"
        stand_in = graph.initializer.add(name=weight, data_type=onnx.TensorProto.FLOAT)
        stand_in.dims.extend((attribute(node, "K", 0), attribute(node, "N", 0)))
        stand_in.data_location = onnx.TensorProto.EXTERNAL
        stand_in.external_data.add(key="location", value="left-out")
        yield onnx.helper.make_node("MatMul", [node.input[0], weight], node.output[:1])
    elif node.op_type == "MatMulIntegerToFloat" and node.output:
        sums = f"{node.output[0]}.sums"
        yield onnx.helper.make_node("MatMulInteger", node.input[:2], [sums])
        yield onnx.helper.make_node("Cast", [sums], node.output[:1], to=onnx.TensorProto.FLOAT)
    elif node.op_type in LIKE_FIRST_INPUT and _first_keeps_width(node):
        yield onnx.helper.make_node("Identity", node.input[:1], node.output[:1])
    else:
        yield node


def _first_keeps_width(node: onnx.NodeProto) -> bool:
    """Whether the first input has the output's shape; queries packed with K and V do not."""
    packed = node.op_type == "GroupQueryAttention" and not (node.input[1:2] and node.input[1])
    return bool(node.input) and not packed


def _recorded(model: onnx.ModelProto, axes: Axes) -> list[onnx.ValueInfoProto]:
    values = (*model.graph.value_info, *model.graph.output)
    inner = [_bound(model, value, axes) for value in values]
    return [value for value in inner if not _is_open(shape_of(value))]


def _bound(
    model: onnx.ModelProto, value: onnx.ValueInfoProto, axes: Axes
) -> onnx.ValueInfoProto:
    """A copy with every axis that has a value as a number."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    for dim in copy.type.tensor_type.shape.dim:
        size = evaluate_axis(dim.dim_param, axes) if dim.dim_param else None
        if size is not None and size > MOST_ELEMENTS:
            raise _too_large(model, value.name, axes)
        if size is not None and size >= 0:
            dim.dim_value = size
    return copy
