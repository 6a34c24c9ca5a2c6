"""Rules on stored tensors: external data that is there, and Q/DQ that TensorRT takes.

TensorRT reads block-wise INT4 weights only where they are two-dimensional constants; with one
scale a channel it would dequantize the whole weight in each run, so that form is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import ExternalDataInfo

_EXTERNAL = onnx.TensorProto.EXTERNAL
_INT4 = onnx.TensorProto.INT4
_HALF_BYTE = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4}
_SYMMETRIC = (
    "Quantize symmetrically and leave the zero point out; write asymmetric INT4 weights as a "
    "block-sum correction."
)


@dataclass(frozen=True)
class Finding:
    """A rule broken: what, and the cure."""

    what: str
    cure: str


def tensor_bytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes of a tensor's data; None for types without a fixed size."""
    count = int(np.prod(tensor.dims, dtype=np.int64)) if tensor.dims else 1
    if tensor.data_type in _HALF_BYTE:
        return (count + 1) // 2
    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def check_external_data(tensor: onnx.TensorProto, folder: Path) -> Finding | None:
    """Is the data of a tensor there, inside ``folder``, and of the right length?"""
    if tensor.data_location != _EXTERNAL:
        return None
    info: Any = ExternalDataInfo(tensor)
    location = Path(info.location)
    if location.is_absolute() or ".." in location.parts:
        return Finding(
            f"external data at {info.location!r}, outside the model's folder",
            "Save the model again with its data beside it.",
        )
    path = folder / location
    if not path.is_file():
        return Finding(
            f"external data file {info.location!r} is missing",
            "Copy it beside the .onnx file, under its own name.",
        )
    expected, offset = tensor_bytes(tensor), info.offset or 0
    length = info.length if info.length else expected
    if expected is not None and length != expected:
        return Finding(
            f"external data of {tensor.name!r} is {length} bytes, its shape needs {expected}",
            "Save the model again.",
        )
    size = path.stat().st_size
    if length is not None and offset + length > size:
        return Finding(
            f"external data file {info.location!r} ends at byte {size}, before "
            f"{tensor.name!r} does ({offset + length})",
            "The copy broke off: copy or compile again.",
        )
    return None


class WeightReader:
    """Constants of a model by name, read one at a time.

    Args:
        tensors: initializers and Constant values by name.
        folder: of the model; None if it is not on disk.
    """

    def __init__(self, tensors: Mapping[str, onnx.TensorProto], folder: Path | None) -> None:
        self.tensors = tensors
        self.folder = folder

    def array(self, name: str) -> npt.NDArray[Any] | None:
        """The values; None if this is no constant, or its data is not here."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_location == _EXTERNAL:
            if self.folder is None or check_external_data(tensor, self.folder) is not None:
                return None
            return onnx.numpy_helper.to_array(tensor, base_dir=str(self.folder))
        return onnx.numpy_helper.to_array(tensor)


def check_quantization(node: onnx.NodeProto, weights: WeightReader) -> Iterator[Finding]:
    """TensorRT's rules on a QuantizeLinear or DequantizeLinear node."""
    yield from _check_zero_point(node, weights)
    scales = weights.array(node.input[1])
    if scales is not None and not bool(np.all(scales.astype(np.float32) > 0)):
        yield Finding(
            f"scale {node.input[1]!r} has values that are not positive",
            "TensorRT 10 asserts scales > 0: give an all-zero block or channel scale 1.",
        )
    weight = weights.tensors.get(node.input[0])
    if node.op_type == "DequantizeLinear" and weight is not None and weight.data_type == _INT4:
        yield from _check_int4(node, weight, weights)


def _check_zero_point(node: onnx.NodeProto, weights: WeightReader) -> Iterator[Finding]:
    if len(node.input) < 3 or not node.input[2]:
        return
    name = node.input[2]
    if name not in weights.tensors:
        yield Finding(f"zero point {name!r} is computed, not constant", _SYMMETRIC)
        return
    values = weights.array(name)
    if values is not None and bool(np.any(values.astype(np.int32) != 0)):
        yield Finding(f"zero point {name!r} is not zero", _SYMMETRIC)


def _check_int4(
    node: onnx.NodeProto, weight: onnx.TensorProto, weights: WeightReader
) -> Iterator[Finding]:
    shape = list(weight.dims)
    attributes = {a.name: a.i for a in node.attribute}
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    if len(shape) != 2:
        yield Finding(
            f"INT4 weight {weight.name!r} has shape {shape}, TensorRT takes two dimensions",
            "Keep it [K, N], and reshape after DequantizeLinear.",
        )
        return
    if block <= 0:
        yield Finding(
            f"INT4 weight {weight.name!r} has no block_size: TensorRT would dequantize all of "
            "it in every run",
            "Quantize in blocks of 128 (64, 32) along K.",
        )
        return
    if shape[1] % 2:
        yield Finding(
            f"INT4 weight {weight.name!r} has {shape[1]} columns, an odd number",
            "Pad the last dimension to an even size.",
        )
    if shape[axis % 2] % block:
        yield Finding(
            f"INT4 weight {weight.name!r} of {shape} does not divide into blocks of {block}",
            "Quantize in blocks that divide it; TensorRT takes whole ones alone.",
        )
        return
    scale = weights.tensors.get(node.input[1])
    expected = [-(-size // block) if i == axis % 2 else size for i, size in enumerate(shape)]
    if scale is None:
        yield Finding(
            f"scale {node.input[1]!r} of an INT4 weight is computed, not constant",
            "Store it as an initializer.",
        )
    elif list(scale.dims) != expected:
        yield Finding(
            f"scale {scale.name!r} has shape {list(scale.dims)}; blocks of {block} along axis "
            f"{axis} of {shape} need {expected}",
            "Quantize again with one scale a block.",
        )
