"""Graphs to files and back, weights streamed one at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from mvlm_export.engines.errors import MvlmError, PassError

from .deferred import Array, DeferredValues, is_packed, values_of

INLINE = 256
"""Constants of fewer bytes stand inside the .onnx file."""

ALIGNMENT = 4096
"""Of tensors in the data file, so that they can be mapped."""

_UNUSABLE = (ValueError, KeyError, TypeError, OnnxGraphSurgeonException)
"""What importing a damaged or unusual model raises."""

Progress = Callable[[int, int, str], None]
"""Called with (tensors written, tensors in all, name)."""


def export_structure(graph: gs.Graph, value_info: bool = True) -> onnx.ModelProto:
    """The model with stand-ins for its deferred weights.

    Args:
        value_info: keep what is known of intermediate tensors.
    """
    proto: onnx.ModelProto = gs.export_onnx(graph)
    if not value_info:
        del proto.graph.value_info[:]
    return proto


def save_structure(graph: gs.Graph, path: Path) -> None:
    """Write a graph without its deferred weights, for people and viewers.

    Raises:
        MvlmError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(export_structure(graph).SerializeToString())
    except OSError as error:
        raise MvlmError(
            f"{path} cannot be written ({error}). Choose another folder."
        ) from error


def save_graph(graph: gs.Graph, path: Path, progress: Progress | None = None) -> None:
    """Write a graph to ``path`` and its weights beside it, to ``path`` + ``.data``.

    Files of these names are replaced when all is written, so a graph may be saved over the
    files that its weights are read from.

    Raises:
        MvlmError: the files cannot be written.
        PassError: a deferred weight is not what it was promised to be.
    """
    proto = export_structure(graph)
    constants = {
        name: tensor
        for name, tensor in graph.tensors().items()
        if isinstance(tensor, gs.Constant)
    }
    data = path.with_name(path.name + ".data")
    parts = [file.with_name(f".{file.name}.part") for file in (path, data)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parts[1].open("wb") as file:
            total = len(proto.graph.initializer)
            for index, tensor in enumerate(proto.graph.initializer, 1):
                _write_tensor(file, tensor, constants[tensor.name], data.name)
                if progress is not None:
                    progress(index, total, tensor.name)
        parts[0].write_bytes(proto.SerializeToString())
        if parts[1].stat().st_size:
            parts[1].replace(data)
        else:
            data.unlink(missing_ok=True)
        parts[0].replace(path)
    except OSError as error:
        raise MvlmError(
            f"{path} cannot be written ({error}). Make room on the disk, or choose another "
            "--output."
        ) from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink()


def _write_tensor(
    file: BinaryIO, tensor: onnx.TensorProto, constant: gs.Constant, location: str
) -> None:
    """Read a constant and put its bytes into the tensor, or into the data file."""
    raw = _raw_bytes(values_of(constant))
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    if len(raw) < INLINE:
        tensor.raw_data = raw
    else:
        _append(file, tensor, raw, location)


def _append(file: BinaryIO, tensor: onnx.TensorProto, raw: bytes, location: str) -> None:
    position = file.tell()
    padding = -position % ALIGNMENT
    file.write(b"\0" * padding)
    file.write(raw)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": position + padding, "length": len(raw)}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))


def _raw_bytes(array: Array) -> bytes:
    """As ONNX stores them: little-endian, 4-bit values packed."""
    return onnx.numpy_helper.from_array(np.ascontiguousarray(array)).raw_data


def to_model(graph: gs.Graph) -> onnx.ModelProto:
    """The whole model in memory, weights included; for graphs of less than 2 GB."""
    proto = export_structure(graph)
    constants = graph.tensors()
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values = np.ascontiguousarray(values_of(constants[tensor.name]))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return proto


def load_graph(path: Path) -> gs.Graph:
    """Read a graph; its weights are read from the data file when they are needed.

    Raises:
        PassError: the file is missing, no ONNX model, or holds what cannot be rewritten.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
        return import_graph(proto, path.parent)
    except (OSError, DecodeError) as error:
        raise PassError(f"{path} cannot be read as ONNX ({error}).") from error
    except _UNUSABLE as error:
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise PassError(
            f"{path} holds what cannot be read ({detail[0]}). Export the model again; sparse "
            "constants and sequences are not supported."
        ) from error


def import_graph(proto: onnx.ModelProto, folder: Path | None = None) -> gs.Graph:
    """A graph from a model in memory.

    An input with a default value (an initializer of its name) becomes that constant.

    Args:
        folder: where its external data lies.
    """
    external = {
        tensor.name: tensor
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    graph = gs.import_onnx(proto)
    for name, tensor in graph.tensors().items():
        if name in external:
            tensor.values = _external_values(external[name], folder)
        elif isinstance(tensor, gs.Constant):
            array = onnx.numpy_helper.to_array(tensor._values.tensor)
            tensor.values = _held(array) if is_packed(array.dtype) else array
    return graph


def _held(array: Array) -> DeferredValues:
    return DeferredValues(array.shape, array.dtype, lambda: array)


def _external_values(tensor: onnx.TensorProto, folder: Path | None) -> DeferredValues:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)

    def read() -> Array:
        if folder is None:
            raise PassError(f"The data of {tensor.name!r} is not in memory.")
        try:
            return onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise PassError(
                f"The weight {tensor.name!r} cannot be read from {folder} ({error}). The data "
                "file is missing or broken off: copy or compile the model again."
            ) from error

    return DeferredValues(tensor.dims, dtype, read)


def bind_weight(graph: gs.Graph, name: str, values: DeferredValues | Array) -> None:
    """Turn the tensor ``name``, which no node makes, into a constant.

    Raises:
        PassError: there is no such tensor, or a node makes it.
    """
    tensor = graph.tensors().get(name)
    if tensor is None or tensor.inputs:
        raise PassError(f"The graph has no free tensor {name!r} to bind a weight to.")
    if isinstance(tensor, gs.Variable):
        tensor.to_constant(values)
    else:
        tensor.values = values
    graph.inputs = [value for value in graph.inputs if value is not tensor]
