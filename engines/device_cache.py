"""The cache of keys and values in a device's memory."""

from __future__ import annotations

import numpy as np

from .device_memory import DeviceMemory, align
from .kv_cache import CacheArray, CacheShape, KvCache


class DeviceKvCache(KvCache):
    """A cache in one allocation of a device; each tensor begins at a multiple of 256 bytes.

    Raises:
        EngineError: the device has no memory for it.
    """

    def __init__(self, shape: CacheShape, memory: DeviceMemory) -> None:
        stride = align(shape.capacity * shape.row_bytes)
        buffer = memory.allocate(shape.tensors * stride)
        starts = [buffer.address + tensor * stride for tensor in range(shape.tensors)]
        super().__init__(shape, starts, buffer)
        self._device = memory
        if shape.form == "fixed":
            with memory.lock:
                memory.zero(buffer.address, shape.tensors * stride)
                memory.synchronize()

    def read_rows(self, tensor: int, start: int, stop: int) -> CacheArray:
        """As :meth:`KvCache.read_rows`."""
        self._check_filled(start, stop)
        shape = self.shape
        rows: CacheArray = np.empty(shape.rows(stop - start), shape.dtype)
        with self._device.lock:
            if shape.form == "append":
                self._device.download(rows, self._place_of(tensor, start))
                self._device.synchronize()
                return rows
            heads = np.empty((shape.heads, stop - start, shape.head_dim), shape.dtype)
            self._device.download(heads, self._place_of(tensor, start), self._head_pitch)
            self._device.synchronize()
        rows[...] = heads.transpose(1, 0, 2)
        return rows

    def write_rows(self, tensor: int, start: int, rows: CacheArray) -> None:
        """As :meth:`KvCache.write_rows`."""
        self._check_rows(start, rows)
        with self._device.lock:
            place = self._place_of(tensor, start)
            if self.shape.form == "append":
                values, pitch = np.ascontiguousarray(rows), None
            else:
                values, pitch = np.ascontiguousarray(rows.transpose(1, 0, 2)), self._head_pitch
            self._device.upload(place, values, pitch)
            self._device.synchronize()  # until here the array must stay

    @property
    def _head_pitch(self) -> int:
        """Bytes of one head's rows in the fixed form."""
        return self.shape.capacity * self._line_bytes

    @property
    def _line_bytes(self) -> int:
        return self.shape.row_bytes // self.shape.heads

    def _place_of(self, tensor: int, row: int) -> int:
        fixed = self.shape.form == "fixed"
        return self.past_address(tensor) + row * (
            self._line_bytes if fixed else self.shape.row_bytes
        )
