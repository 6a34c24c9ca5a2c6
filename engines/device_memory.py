"""Memory of a GPU, and the one stream on which all work with it is queued.

``DeviceMemory`` is what the sessions know of a device. Work is queued and runs in order;
arrays given to ``upload`` and ``download`` must stay as they are until ``synchronize``.

Not run on a GPU yet: the tests run it over a stand-in for CUDA's functions that works on host
memory (tests/engines/fake_cuda.py).
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .cuda_api import CudaHandle, CudaRuntime
from .errors import EngineError

Array = npt.NDArray[Any]

ALIGNMENT = 256
"""Bytes that addresses given to TensorRT are multiples of (NvInferRuntime.h,
setTensorAddress); cudaMalloc gives such."""


def align(size: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Buffer(Protocol):
    """Memory on the device; it is given back when the last reference to it goes."""

    @property
    def address(self) -> int:
        """Where it begins, a multiple of ``ALIGNMENT``, never null."""


class CapturedWork(Protocol):
    """Queued work that was recorded once, with its addresses, and can be queued as one."""

    def launch(self) -> None:
        """Queue it."""


class DeviceMemory(Protocol):
    """A device's memory and its queue of work."""

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever queues work that must not be mixed with another thread's."""

    def allocate(self, size: int) -> Buffer:
        """``size`` bytes; what is in them is not defined.

        Raises:
            EngineError: there is not so much.
        """

    def allocate_staging(self, shape: Sequence[int], dtype: str) -> Array:
        """A page-locked array on the host, which the device copies from and to directly."""

    def upload(self, address: int, array: Array, pitch: int | None = None) -> None:
        """Queue a copy of a contiguous array to the device.

        Args:
            pitch: bytes from where ``array[i]`` goes to where ``array[i + 1]`` goes; None
                means right behind it.
        """

    def download(self, array: Array, address: int, pitch: int | None = None) -> None:
        """Queue a copy from the device into a contiguous array; ``pitch`` as for upload."""

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy within the device."""

    def zero(self, address: int, size: int) -> None:
        """Queue the filling with zeros."""

    def synchronize(self) -> None:
        """Wait until all that was queued is done.

        Raises:
            EngineError: some of it failed.
        """

    def capture(self, enqueue: Callable[[], None]) -> CapturedWork:
        """Record what ``enqueue`` queues, without running it.

        Raises:
            EngineError: it cannot be recorded; nothing of it was queued.
        """


class CudaBuffer:
    """Memory of the GPU; see :class:`Buffer`."""

    def __init__(self, cuda: CudaRuntime, size: int) -> None:
        self.address = int(cuda.call("cudaMalloc", size))
        _release_with(self, cuda, "cudaFree", self.address)


class CudaGraph:
    """An instantiated CUDA graph; see :class:`CapturedWork`."""

    def __init__(self, cuda: CudaRuntime, executable: CudaHandle, stream: CudaHandle) -> None:
        self._cuda, self._executable, self._stream = cuda, executable, stream
        _release_with(self, cuda, "cudaGraphExecDestroy", executable)

    def launch(self) -> None:
        """As :meth:`CapturedWork.launch`."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._stream)


class CudaMemory:
    """The first GPU's memory, with a stream of its own; see :class:`DeviceMemory`.

    Raises:
        EngineError: there is no GPU, or its driver does not fit ``cuda-python``.
    """

    def __init__(self, cuda: CudaRuntime) -> None:
        self._cuda = cuda
        self.lock = threading.RLock()
        flags = cuda.constant("cudaStreamNonBlocking")
        self._stream = cuda.call("cudaStreamCreateWithFlags", flags)
        _release_with(self, cuda, "cudaStreamDestroy", self._stream)
        self._to_device = cuda.constant("cudaMemcpyKind.cudaMemcpyHostToDevice")
        self._to_host = cuda.constant("cudaMemcpyKind.cudaMemcpyDeviceToHost")
        self._within = cuda.constant("cudaMemcpyKind.cudaMemcpyDeviceToDevice")
        self._capture_mode = cuda.constant(
            "cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal"
        )

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, size: int) -> CudaBuffer:
        """As :meth:`DeviceMemory.allocate`."""
        return CudaBuffer(self._cuda, max(size, ALIGNMENT))

    def allocate_staging(self, shape: Sequence[int], dtype: str) -> Array:
        """As :meth:`DeviceMemory.allocate_staging`."""
        cuda, kind = self._cuda, np.dtype(dtype)
        count = math.prod(shape)
        size = max(count * kind.itemsize, 1)
        address = int(cuda.call("cudaMallocHost", size))
        memory = (ctypes.c_uint8 * size).from_address(address)
        array: Array = np.frombuffer(memoryview(memory), kind, count)
        _release_with(array, cuda, "cudaFreeHost", address)
        return array.reshape(shape)  # a view, which keeps the array

    def upload(self, address: int, array: Array, pitch: int | None = None) -> None:
        """As :meth:`DeviceMemory.upload`."""
        if pitch is None:
            self._copy(address, array.ctypes.data, array.nbytes, self._to_device)
        elif array.nbytes:
            place, width = array.ctypes.data, array[0].nbytes
            rows = (width, len(array), self._to_device, self._stream)
            self._cuda.call("cudaMemcpy2DAsync", address, pitch, place, width, *rows)

    def download(self, array: Array, address: int, pitch: int | None = None) -> None:
        """As :meth:`DeviceMemory.download`."""
        if pitch is None:
            self._copy(array.ctypes.data, address, array.nbytes, self._to_host)
        elif array.nbytes:
            place, width = array.ctypes.data, array[0].nbytes
            rows = (width, len(array), self._to_host, self._stream)
            self._cuda.call("cudaMemcpy2DAsync", place, width, address, pitch, *rows)

    def copy(self, target: int, source: int, size: int) -> None:
        """As :meth:`DeviceMemory.copy`."""
        self._copy(target, source, size, self._within)

    def _copy(self, target: int, source: int, size: int, kind: CudaHandle) -> None:
        if size:
            self._cuda.call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def zero(self, address: int, size: int) -> None:
        """As :meth:`DeviceMemory.zero`."""
        self._cuda.call("cudaMemsetAsync", address, 0, size, self._stream)

    def synchronize(self) -> None:
        """As :meth:`DeviceMemory.synchronize`."""
        self._cuda.call("cudaStreamSynchronize", self._stream)

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """As :meth:`DeviceMemory.capture`."""
        cuda, stream = self._cuda, self._stream
        cuda.call("cudaStreamBeginCapture", stream, self._capture_mode)
        try:
            enqueue()
        except BaseException:
            cuda.release("cudaStreamEndCapture", stream)
            cuda.release("cudaGetLastError")  # or the next call would report it again
            raise
        try:
            graph = cuda.call("cudaStreamEndCapture", stream)
        except EngineError:
            cuda.release("cudaGetLastError")
            raise
        try:
            executable = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.release("cudaGraphDestroy", graph)
        return CudaGraph(cuda, executable, stream)


def _release_with(owner: object, cuda: CudaRuntime, function: str, handle: CudaHandle) -> None:
    """Call ``function`` when ``owner`` goes; at the end of the process the driver does it."""
    weakref.finalize(owner, cuda.release, function, handle).atexit = False
