"""CUDA's runtime functions on host memory, as ``cuda.bindings.runtime`` has them.

As on a GPU, work is queued and done at the next synchronization, in order, and copies read
their memory then: what forgets to wait gets what was there before. New memory is filled with
ones (a NaN as a float); what touches memory outside an allocation, or at a time that CUDA
does not allow, is an error.
"""

from __future__ import annotations

import bisect
import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Operation = Callable[[], None]


class IllegalAddressError(Exception):
    """Queued work touched memory that is not allocated."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorUnknown = 999


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


OK = cudaError_t.cudaSuccess


@dataclass
class Space:
    """Allocated blocks of one kind of memory."""

    blocks: dict[int, np.ndarray] = field(default_factory=dict)

    def allocate(self, size: int) -> int:
        block = np.full(size + 256, 0xFF, np.uint8)
        offset = -block.ctypes.data % 256
        address = block.ctypes.data + offset
        self.blocks[address] = block[offset : offset + size]
        return address

    def check(self, address: int, size: int) -> None:
        starts = sorted(self.blocks)
        place = bisect.bisect_right(starts, address) - 1
        if place < 0 or address + size > starts[place] + len(self.blocks[starts[place]]):
            raise IllegalAddressError(f"{size} bytes at {address}")


class FakeCuda:
    """The module, with what it holds; ``fail`` makes the next call of a function fail."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self) -> None:
        self._device, self._host = Space(), Space()
        self._queue: list[Operation] = []
        self._capture: list[Operation] | None = None
        self._invalidated = False
        self._graphs: dict[int, list[Operation]] = {}
        self._failing: dict[str, cudaError_t] = {}
        self._limit: int | None = None
        self._copies: list[tuple[str, int]] = []
        self._launches = 0

    # What tests ask of it; the names below with "cuda" in front are CUDA's.

    def _fail(self, name: str, status: cudaError_t) -> None:
        self._failing[name] = status

    def _enqueue(self, operation: Operation) -> None:
        (self._queue if self._capture is None else self._capture).append(operation)

    def _status(self, name: str) -> cudaError_t:
        return self._failing.pop(name, OK)

    def _unsafe(self, name: str) -> cudaError_t:
        """Of a call that may not be made while work is captured."""
        if self._capture is not None:
            self._invalidated = True
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        return self._status(name)

    def _drain(self) -> cudaError_t:
        queue, self._queue = self._queue, []
        try:
            for operation in queue:
                operation()
        except IllegalAddressError:
            return cudaError_t.cudaErrorIllegalAddress
        return OK

    # Errors.

    def cudaGetErrorName(self, error):
        return OK, cudaError_t(error).name.encode()

    def cudaGetErrorString(self, error):
        return OK, b"what went wrong"

    def cudaGetLastError(self):
        return (OK,)

    # Memory.

    def cudaMalloc(self, size):
        status = self._unsafe("cudaMalloc")
        used = sum(map(len, self._device.blocks.values()))
        if self._limit is not None and used + size > self._limit:
            status = cudaError_t.cudaErrorMemoryAllocation
        return (status, self._device.allocate(size)) if status == OK else (status, None)

    def cudaFree(self, devPtr):
        status = self._unsafe("cudaFree") or self._drain()
        del self._device.blocks[devPtr]
        return (status,)

    def cudaMallocHost(self, size):
        status = self._unsafe("cudaMallocHost")
        return (status, self._host.allocate(size)) if status == OK else (status, None)

    def cudaFreeHost(self, ptr):
        status = self._unsafe("cudaFreeHost") or self._drain()
        del self._host.blocks[ptr]
        return (status,)

    def cudaMemcpyAsync(self, dst, src, count, kind, stream):
        return self.cudaMemcpy2DAsync(dst, count, src, count, count, 1, kind, stream)

    def cudaMemcpy2DAsync(self, dst, dpitch, src, spitch, width, height, kind, stream):
        status = self._status("cudaMemcpyAsync")
        if status != OK or min(dpitch, spitch) < width:
            return (status or cudaError_t.cudaErrorInvalidValue,)
        to_device = kind in (1, 3)
        from_device = kind in (2, 3)

        def copy() -> None:
            for row in range(height):
                target, source = dst + row * dpitch, src + row * spitch
                for checked, place in ((to_device, target), (from_device, source)):
                    if checked:
                        self._device.check(place, width)
                ctypes.memmove(target, source, width)
            self._copies.append((cudaMemcpyKind(kind).name[10:], width * height))

        self._enqueue(copy)
        return (OK,)

    def cudaMemsetAsync(self, devPtr, value, count, stream):
        def fill() -> None:
            self._device.check(devPtr, count)
            ctypes.memset(devPtr, value, count)

        self._enqueue(fill)
        return (self._status("cudaMemsetAsync"),)

    # Streams and graphs.

    def cudaStreamCreateWithFlags(self, flags):
        status = self._status("cudaStreamCreateWithFlags")
        return (status, 7001 if status == OK else None)

    def cudaStreamDestroy(self, stream):
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        return (self._unsafe("cudaStreamSynchronize") or self._drain(),)

    def cudaStreamBeginCapture(self, stream, mode):
        status = self._status("cudaStreamBeginCapture")
        if status == OK:
            self._capture, self._invalidated = [], False
        return (status,)

    def cudaStreamEndCapture(self, stream):
        captured, self._capture = self._capture, None
        status = self._status("cudaStreamEndCapture")
        if self._invalidated:
            status = cudaError_t.cudaErrorStreamCaptureInvalidated
        if status != OK:
            return status, None
        self._graphs[handle := 9000 + len(self._graphs)] = captured
        return OK, handle

    def cudaGraphInstantiate(self, graph, flags):
        status = self._status("cudaGraphInstantiate")
        if status != OK:
            return status, None
        self._graphs[handle := 9000 + len(self._graphs)] = self._graphs[graph]
        return OK, handle

    def cudaGraphDestroy(self, graph):
        self._graphs[graph] = []
        return (OK,)

    def cudaGraphLaunch(self, graphExec, stream):
        self._launches += 1
        for operation in self._graphs[graphExec]:
            self._enqueue(operation)
        return (self._status("cudaGraphLaunch"),)

    def cudaGraphExecDestroy(self, graphExec):
        self._graphs[graphExec] = []
        return (OK,)
