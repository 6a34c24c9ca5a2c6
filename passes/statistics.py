"""What a graph is made of: operators, tensors, multiply-accumulates, weights by dtype.

Weights are never read: their sizes stand in the graph, and the data file may be missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from mvlm_export.engines.errors import PassError

from .bound_shapes import MOST_ELEMENTS, Axes, Shape, graph_inputs, shape_of
from .graph_io import export_structure
from .macs import MacCount, count_macs, dynamic_axes, operator_name

LARGEST = 8
"""Weights that are named."""

_DTYPE_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}
_SUB_BYTE_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_BYTES = {
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 8),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 4),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 2),
    "COMPLEX128": 16,
}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output; an axis is a number, a name, or None if nothing is known."""

    name: str
    dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class WeightInfo:
    """One constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class WeightTotal:
    """All constants of one dtype; two 4-bit values share a byte."""

    count: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class GraphStatistics:
    """What a graph is made of.

    Attributes:
        opset: of ONNX's own operators; ``domains`` holds the others.
        operators: nodes by operator, most frequent first.
        axes: names of the dynamic axes of the inputs.
        weights: constants by dtype, most bytes first.
        largest: the largest constants.
    """

    name: str
    opset: int
    ir_version: int
    domains: Mapping[str, int]
    nodes: int
    operators: Mapping[str, int]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    axes: tuple[str, ...]
    macs: MacCount
    weights: Mapping[str, WeightTotal]
    largest: tuple[WeightInfo, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all constants."""
        return sum(total.bytes for total in self.weights.values())

    @property
    def weight_count(self) -> int:
        """Number of constants."""
        return sum(total.count for total in self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        totals = {"weight_bytes": self.weight_bytes, "weight_count": self.weight_count}
        return {**asdict(self), **totals}


def read_model(path: Path) -> onnx.ModelProto:
    """A model without its external data.

    Raises:
        PassError: the file is missing or no ONNX model, or its nodes make a cycle.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, ValueError, RuntimeError, DecodeError) as error:
        raise PassError(
            f"{path} cannot be read as ONNX ({error}). Give an .onnx file."
        ) from error
    if not model.opset_import or not model.graph.output:
        raise PassError(f"{path} is no ONNX model: it has no graph. Give an .onnx file.")
    broken = next((text for text in _texts(model) if isinstance(text, bytes)), None)
    if broken is not None:
        raise PassError(
            f"{path} is no ONNX model: the text {broken!r} in it is not UTF-8. Copy the file "
            "again, or export it again."
        )
    cycle = _cycle(model.graph)
    if cycle:
        raise PassError(
            f"{path} is no ONNX model: its nodes make a cycle, {' → '.join(cycle)}. Export "
            "the model again."
        )
    return model


def _texts(message: Message) -> Iterator[str | bytes]:
    """All texts of a model; what is not UTF-8 comes as bytes."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING:
            yield from [value] if isinstance(value, (str, bytes)) else value
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for part in [value] if isinstance(value, Message) else value:
                yield from _texts(part)


def _cycle(graph: onnx.GraphProto) -> list[str]:
    """Nodes each of which reads from the one before it, first and last the same; or none."""
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    read = {
        index: [makers[name] for name in node.input if name in makers]
        for index, node in enumerate(graph.node)
    }
    try:
        TopologicalSorter(read).prepare()
    except CycleError as error:
        nodes = (graph.node[index] for index in error.args[1])
        return [f"{node.op_type} {node.name or node.output[0]!r}" for node in nodes]
    return []


def graph_statistics(graph: gs.Graph, axes: Axes) -> GraphStatistics:
    """What a graph is made of.

    Args:
        axes: values of the dynamic axes by name, for the multiply-accumulates; those that the
            graph lacks are ignored.
    """
    return model_statistics(export_structure(graph), axes)


def file_statistics(path: Path, axes: Axes) -> GraphStatistics:
    """What a graph in a file is made of.

    Raises:
        PassError: the file is missing or no ONNX model.
    """
    return model_statistics(read_model(path), axes)


def model_statistics(model: onnx.ModelProto, axes: Axes) -> GraphStatistics:
    """What a model in memory is made of; its weights need not be there."""
    graph = model.graph
    opsets = {item.domain: item.version for item in model.opset_import}
    standard = max(opsets.pop("", 0), opsets.pop("ai.onnx", 0))
    weights = sorted(_weights(graph), key=lambda weight: -weight.bytes)
    operators = Counter(operator_name(node) for node in graph.node)
    return GraphStatistics(
        name=graph.name,
        opset=standard,
        ir_version=model.ir_version,
        domains=opsets,
        nodes=len(graph.node),
        operators=dict(operators.most_common()),
        inputs=tuple(_tensor(value) for value in graph_inputs(graph)),
        outputs=tuple(_tensor(value) for value in graph.output),
        axes=dynamic_axes(model),
        macs=count_macs(model, axes),
        weights=_totals(weights),
        largest=tuple(weights[:LARGEST]),
    )


def dtype_name(data_type: int) -> str:
    """ONNX's number of a dtype as numpy calls it: ``float32``."""
    if data_type not in onnx.TensorProto.DataType.values():
        return f"dtype {data_type}"
    name = str(onnx.TensorProto.DataType.Name(data_type))
    return _DTYPE_NAMES.get(name, name.lower())


def _tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    elem_type = value.type.tensor_type.elem_type
    return TensorInfo(value.name, dtype_name(elem_type), shape_of(value))


def _weights(graph: onnx.GraphProto) -> Iterator[WeightInfo]:
    """Initializers, and what Constant nodes hold."""
    for tensor in graph.initializer:
        yield _weight(tensor.name, tensor)
    for node in graph.node:
        if node.op_type == "Constant":
            for item in node.attribute:
                if item.HasField("t"):
                    yield _weight(next(iter(node.output), node.name), item.t)


def _weight(name: str, tensor: onnx.TensorProto) -> WeightInfo:
    shape = tuple(tensor.dims)
    if min(shape, default=1) < 0 or math.prod(shape) > MOST_ELEMENTS:
        raise PassError(
            f"The weight {name!r} cannot have the shape {list(shape)}: the file is damaged. "
            "Export the model again."
        )
    size = _stored_bytes(math.prod(shape), tensor.data_type)
    return WeightInfo(name, dtype_name(tensor.data_type), shape, size)


def _stored_bytes(elements: int, data_type: int) -> int:
    name = dtype_name(data_type)
    key = next((k for k, v in _DTYPE_NAMES.items() if v == name), name.upper())
    if key in _SUB_BYTE_BITS:
        return math.ceil(elements * _SUB_BYTE_BITS[key] / 8)
    return elements * _BYTES.get(key, 1)


def _totals(weights: list[WeightInfo]) -> dict[str, WeightTotal]:
    groups: dict[str, list[WeightInfo]] = {}
    for weight in weights:
        groups.setdefault(weight.dtype, []).append(weight)
    totals = {
        dtype: WeightTotal(
            count=len(group),
            elements=sum(math.prod(weight.shape) for weight in group),
            bytes=sum(weight.bytes for weight in group),
        )
        for dtype, group in groups.items()
    }
    return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))
