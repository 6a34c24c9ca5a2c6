"""Shapes and dtypes of every tensor of a graph, by ONNX's own inference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from .graph_io import export_structure
from .matching import describe, is_foreign

Axis: TypeAlias = "int | str | None"


def infer_types(graph: gs.Graph) -> None:
    """Fill in shapes and dtypes, and check those that are there.

    What inference leaves open (sums of dynamic axes, operators of other domains) stays as it
    was recorded.

    Raises:
        PassError: the graph is not well-formed: a tensor that nobody makes, a name twice,
            types that an operator does not take, a shape other than recorded.
    """
    require_sound(graph)
    proto = export_structure(graph, value_info=False)
    known = _foreign_value_info(graph)
    proto.graph.value_info.extend(known)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError) as error:
        raise PassError(f"the graph it left is not well-formed: {error}") from error
    tensors = graph.tensors()
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = tensors.get(value.name)
        if isinstance(tensor, gs.Variable) and value.type.HasField("tensor_type"):
            _update(tensor, value.type.tensor_type)
    for node in graph.nodes:
        if not is_foreign(node):
            _require_typed(node, graph.opset)


def require_sound(graph: gs.Graph) -> None:
    """Check names and wiring, before graph-surgeon (which goes by names) sorts and sweeps.

    Raises:
        PassError: two tensors have one name, nobody makes a tensor that is read, or one tensor
            is two outputs.
    """
    if len({id(tensor) for tensor in graph.outputs}) != len(graph.outputs):
        names = ", ".join(tensor.name for tensor in graph.outputs)
        raise PassError(f"two of the graph's outputs are one tensor: {names}")
    named: dict[str, gs.Tensor] = {}
    inputs = {id(tensor) for tensor in graph.inputs}
    made = {id(tensor) for node in graph.nodes for tensor in node.outputs} | inputs
    read = [(tensor, node.name) for node in graph.nodes for tensor in node.inputs]
    read += [(tensor, "the caller") for tensor in (*graph.inputs, *graph.outputs)]
    for tensor, reader in read:
        if tensor.is_empty():
            continue
        if named.setdefault(tensor.name, tensor) is not tensor:
            raise PassError(f"two tensors are named {tensor.name!r}")
        if id(tensor) not in made and not isinstance(tensor, gs.Constant):
            raise PassError(f"nobody makes {tensor.name!r}, which {reader!r} reads")
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and named.setdefault(tensor.name, tensor) is not tensor:
                raise PassError(f"two tensors are named {tensor.name!r}")


def _foreign_value_info(graph: gs.Graph) -> list[onnx.ValueInfoProto]:
    """What is recorded of the outputs of operators that ONNX does not know."""
    to_proto = gs.exporters.onnx_exporter.OnnxExporter.export_value_info_proto
    outputs = {id(tensor) for tensor in graph.outputs}
    return [
        to_proto(tensor, False)
        for node in graph.nodes
        if is_foreign(node)
        for tensor in node.outputs
        if tensor.name and tensor.dtype is not None and id(tensor) not in outputs
    ]


def _require_typed(node: gs.Node, opset: int) -> None:
    """Hold operands to the operator's type parameters, which inference does not look at.

    Raises:
        PassError: two operands that must be of one dtype are not.
    """
    schema = _schema(node.op, opset)
    bound: dict[str, tuple[str, Any]] = {}
    for formals, tensors in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for index, tensor in enumerate(tensors):
            formal = formals[min(index, len(formals) - 1)]
            if not tensor.name or tensor.dtype is None or not formal.is_homogeneous:
                continue
            dtype = np.dtype(numpy_dtype(tensor))
            name, first = bound.setdefault(formal.type_str, (tensor.name, dtype))
            if first != dtype:
                raise PassError(
                    f"{describe(node)} takes {name!r}, which is {first}, and {tensor.name!r}, "
                    f"which is {dtype}, where both must be of one type"
                )


@functools.cache
def _schema(operator: str, opset: int) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(operator, opset)


def numpy_dtype(tensor: gs.Tensor) -> Any:  # noqa: ANN401
    """The numpy dtype of a tensor, whose dtype graph-surgeon may hold as ONNX's number."""
    dtype = tensor.dtype
    return onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype


def _update(tensor: gs.Variable, found: onnx.TypeProto.Tensor) -> None:
    if found.elem_type:
        tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(found.elem_type)
    if not found.HasField("shape"):
        return
    dims = [_axis(dim) for dim in found.shape.dim]
    recorded: Sequence[int | str | None] | None = tensor.shape
    if recorded is None:
        tensor.shape = dims
        return
    if len(recorded) != len(dims):
        raise PassError(f"{tensor.name!r} is recorded as {list(recorded)}, which is {dims}")
    tensor.shape = [_merge(tensor, old, new) for old, new in zip(recorded, dims, strict=True)]


def _axis(dim: onnx.TensorShapeProto.Dimension) -> Axis:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    if dim.dim_param and not dim.dim_param.startswith("unk__"):
        return str(dim.dim_param)
    return None


def _merge(tensor: gs.Variable, old: Axis, new: Axis) -> Axis:
    if new is None:
        return old
    if isinstance(old, int) and isinstance(new, int) and old != new:
        raise PassError(f"{tensor.name!r} is recorded with an axis of {old}, which is {new}")
    return new
