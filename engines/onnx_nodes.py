"""Names and operators of an ONNX file's nodes, read without the onnx package.

An ONNX file is one protobuf message (https://protobuf.dev/programming-guides/encoding): fields
that are a number, a wire type and a value. Four of them are needed here, by the numbers in
onnx.proto: ModelProto.graph 7, GraphProto.node 1, NodeProto.name 3, NodeProto.op_type 4.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from .errors import EngineError

_GRAPH, _NODE, _NAME, _OP = 7, 1, 3, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_operators(path: Path) -> dict[str, str]:
    """Operator of each node of the main graph that has a name.

    Raises:
        EngineError: the file is no protobuf message.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m,
        ):
            return dict(_nodes(m))
    except (OSError, ValueError, IndexError) as error:
        raise EngineError(f"{path} is no ONNX file ({error}). Compile it again.") from error


def _nodes(data: mmap.mmap) -> Iterator[tuple[str, str]]:
    for number, start, end in _fields(data, 0, len(data)):
        if number != _GRAPH:
            continue
        for inner, node_start, node_end in _fields(data, start, end):
            if inner == _NODE:
                texts = {
                    field: data[first:last].decode()
                    for field, first, last in _fields(data, node_start, node_end)
                    if field in (_NAME, _OP)
                }
                if texts.get(_NAME):
                    yield texts[_NAME], texts.get(_OP, "")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each field that holds bytes."""
    while start < end:
        tag, start = _varint(data, start)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            _, start = _varint(data, start)
        elif wire in (_FIXED64, _FIXED32):
            start += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, start = _varint(data, start)
            if start + size > end:
                raise ValueError("a field ends behind the message it is in")
            yield number, start, start + size
            start += size
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, start
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
