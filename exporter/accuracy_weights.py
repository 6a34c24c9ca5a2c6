"""What the weights of a bundle take, by what they hold, and what each layer lost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import BundleError
from mvlm_export.engines.manifest import GRAPHS, Manifest

from .accuracy_report import LayerNoise
from .tolerances import quantized_layers

CODES, SCALES = "codes", "scales"

ROLES: Mapping[str, tuple[str | None, ...]] = {
    "DequantizeLinear": (CODES, SCALES, SCALES),
    "QuantizeLinear": (None, SCALES, SCALES),
    "MatMulNBits": (None, CODES, SCALES, SCALES),
    "MatMulIntegerToFloat": (None, CODES, SCALES, SCALES, SCALES, SCALES),
    "GatherBlockQuantized": (CODES, None, SCALES),
}
"""What constants are to an operator, by the place of the input; zero points go with scales."""

_BITS = {"INT4": 4, "UINT4": 4}


def weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of a graph's initializers, whose values are not read.

    Returns:
        Those that there are of ``int8`` and ``int4`` (codes), ``scales``, ``float32``,
        ``float16`` and ``other``.

    Raises:
        BundleError: the file is no ONNX graph.
    """
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise BundleError(
            f"{path} is no ONNX graph ({error}). Compile the bundle again."
        ) from error
    roles = dict(_roles(graph))
    found: dict[str, int] = {}
    for tensor in graph.initializer:
        dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
        held = roles.get(tensor.name) or _FLOATS.get(dtype, "other")
        found[held] = found.get(held, 0) + _bytes_of(tensor, dtype)
    return found


_FLOATS = {"FLOAT": "float32", "FLOAT16": "float16"}


def layer_noise(manifest: Manifest) -> list[LayerNoise]:
    """Of each quantized weight, from the errors that the compile noted."""
    return [
        LayerNoise(graph, name, str(layer["form"]), decibels(float(str(layer["error"]))))
        for graph in GRAPHS
        for name, layer in quantized_layers(manifest, graph).items()
        if layer["error"] is not None
    ]


def decibels(error: float) -> float:
    """SQNR of a relative error; infinite for none."""
    return -20 * math.log10(error) if error else math.inf


def bundle_weight_bytes(bundle: Bundle) -> dict[str, dict[str, int]]:
    """:func:`weight_bytes` of each graph.

    Raises:
        BundleError: a file is no ONNX graph.
    """
    return {name: weight_bytes(bundle.graph_path(name)) for name in GRAPHS}


def _roles(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """(initializer, what it holds) of those that quantized operators read, or rows of them."""
    dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    rows = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Gather"}
    for node in graph.node:
        roles = ROLES.get(node.op_type, ())
        for given, role in zip(node.input, roles, strict=False):
            name = rows.get(given, given)
            if role is not None and name in dtypes:
                yield name, _codes_of(node, dtypes[name]) if role == CODES else role


def _codes_of(node: onnx.NodeProto, data_type: int) -> str:
    """``int8`` or ``int4``; packed codes are bytes whose operator knows their bits."""
    bits = [attribute.i for attribute in node.attribute if attribute.name == "bits"]
    dtype = onnx.TensorProto.DataType.Name(data_type)
    return f"int{bits[0] if bits else _BITS.get(dtype, 8)}"


def _bytes_of(tensor: onnx.TensorProto, dtype: str) -> int:
    count: int = math.prod(tensor.dims)
    if dtype in _BITS:
        return (count * _BITS[dtype] + 7) // 8
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
