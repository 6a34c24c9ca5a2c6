"""Linear layers as these passes see them: a MatMul by a constant, perhaps a bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from ..base import numpy_dtype
from ..deferred import Array, derive
from ..editing import consumers, fresh_name, is_graph_output, producer
from ..matching import constant_problem, describe, is_op

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def is_matmul(node: gs.Node | None) -> bool:
    """Whether a node is ONNX's own MatMul."""
    return is_op(node, "MatMul")


def is_float_cast(node: gs.Node) -> bool:
    """Whether a node is a Cast of floats to floats, which keeps factors but for rounding."""
    return is_op(node, "Cast") and all(map(_is_float, (node.inputs[0], node.outputs[0])))


def _is_float(tensor: gs.Tensor) -> bool:
    if tensor.dtype is None:
        return False
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(numpy_dtype(tensor))) in _FLOATS


def weight_problem(graph: gs.Graph, matmul: gs.Node) -> str | None:
    """Why values cannot be folded into a MatMul's weight ``[K, N]``; None if they can."""
    weight = matmul.inputs[1]
    made = producer(weight)
    if is_op(made, "DequantizeLinear"):
        return f"the weight {weight.name!r} is quantized; fold first, then quantize"
    problem = constant_problem(graph, weight, matmul)
    if problem is None and len(weight.shape) != 2:
        return f"the weight {weight.name!r} has {len(weight.shape)} axes, not 2"
    return problem


def readers_problem(graph: gs.Graph, tensor: gs.Tensor) -> str | None:
    """Why a factor of ``tensor``'s channels cannot move into its readers; None if it can.

    Every reader must be a MatMul that multiplies it by a weight of its own.
    """
    if is_graph_output(graph, tensor):
        return f"{tensor.name!r} is an output of the graph"
    readers = consumers(tensor)
    if not readers:
        return f"{tensor.name!r} is read by nobody"
    for reader in readers:
        if not is_matmul(reader):
            return f"{tensor.name!r} is read by {describe(reader)}, which is no MatMul"
        if reader.inputs[0] is not tensor:
            return f"{tensor.name!r} is the right operand of {describe(reader)}"
        problem = weight_problem(graph, reader)
        if problem is not None:
            return problem
    return None


def bias_add(graph: gs.Graph, matmul: gs.Node) -> gs.Node | None:
    """The Add of a constant vector that alone reads a MatMul's result, if there is one."""
    result = matmul.outputs[0]
    readers = consumers(result)
    if len(readers) != 1 or not is_op(readers[0], "Add") or is_graph_output(graph, result):
        return None
    bias = bias_of(readers[0], result)
    width = matmul.inputs[1].shape
    if not isinstance(bias, gs.Constant) or width is None:
        return None
    vector = len(bias.shape) > 0 and bias.shape[-1] == width[-1]
    rest_is_one = all(axis == 1 for axis in bias.shape[:-1])
    fits = rest_is_one and len(bias.shape) <= len(result.shape or ())
    return readers[0] if vector and fits else None


def bias_of(add: gs.Node, result: gs.Tensor) -> gs.Tensor:
    """The other operand of an Add that reads ``result``."""
    return add.inputs[1] if add.inputs[0] is result else add.inputs[0]


def replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let a node read ``new`` wherever it read ``old``."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def rewrite_constant(
    graph: gs.Graph,
    node: gs.Node,
    constant: gs.Constant,
    suffix: str,
    compute: Callable[..., Array],
    others: Sequence[gs.Constant] = (),
) -> None:
    """Let ``node`` read ``compute(constant, *others)``, of the same shape, in its place."""
    name = fresh_name(graph, f"{constant.name}.{suffix}")
    changed = derive(name, [constant, *others], compute, constant.shape)
    replace_input(node, constant, changed)
