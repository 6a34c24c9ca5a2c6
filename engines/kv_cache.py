"""The cache of keys and values: one class, two forms of memory.

``append``: each tensor is [capacity, H_kv, head_dim], so the first T rows and the rows right
behind them are both contiguous. A backend binds the past to the start of the buffer and the
graph's new rows to the address behind it: nothing is ever moved.

``fixed``: each tensor is [1, H_kv, capacity, head_dim], and the graph is told by
``past_length`` how many rows are filled. Past and present are bound to one address: the graph
writes its new rows in place. Rows behind the filled ones are masked, which a NaN would pass,
so they are zero or finite leftovers, never what was there before.

The book-keeping needs addresses only, so it is the same for host memory and for a GPU's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import EngineError
from .host_memory import zeros_on_demand

CacheArray = npt.NDArray[np.number[Any]]
"""Rows: float16, float32, or int8 codes, each worth the manifest's scale of its tensor."""
KvForm = Literal["append", "fixed"]
KV_FORMS: tuple[KvForm, ...] = ("append", "fixed")
"""Forms of the decoder's cache, by the manifest's name."""


def cache_names(prefix: str, layers: int) -> list[str]:
    """``{prefix}.{n}.key`` and ``.value`` of each layer, in the decoder's order."""
    return [f"{prefix}.{n}.{part}" for n in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class CacheShape:
    """Size of a cache; tensors are numbered key 0, value 0, key 1, value 1, ...

    Attributes:
        capacity: most rows (positions) it can hold.
        dtype: numpy's name of the element type, ``float32``, ``float16`` or ``int8``.
        form: how the rows lie in memory, one of ``KV_FORMS``.
    """

    layers: int
    heads: int
    head_dim: int
    capacity: int
    dtype: str
    form: KvForm = "append"

    @property
    def tensors(self) -> int:
        """Number of buffers: a key and a value for each layer."""
        return 2 * self.layers

    @property
    def row_bytes(self) -> int:
        """Bytes of one position in one tensor."""
        return self.heads * self.head_dim * np.dtype(self.dtype).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.tensors * self.capacity * self.row_bytes

    @property
    def buffer(self) -> tuple[int, ...]:
        """Shape of one tensor's buffer."""
        if self.form == "fixed":
            return 1, self.heads, self.capacity, self.head_dim
        return self.rows(self.capacity)

    def rows(self, count: int) -> tuple[int, int, int]:
        """Shape of ``count`` rows of one tensor."""
        return count, self.heads, self.head_dim

    def as_rows(self, buffer: CacheArray) -> CacheArray:
        """A whole buffer seen as [capacity, H_kv, head_dim], without a copy."""
        return buffer[0].transpose(1, 0, 2) if self.form == "fixed" else buffer


class KvCache(ABC):
    """Which rows of the buffers are filled, and where the next ones go.

    A backend's cache adds how rows are read and written from the host.

    Args:
        shape: its size.
        addresses: start of each tensor's buffer, of ``capacity`` rows each.
        memory: what owns the buffers; held so that they live as long as the cache.

    Attributes:
        writes_cheaply: False where ``write_rows`` costs about as much as running the rows.
    """

    writes_cheaply = True

    def __init__(self, shape: CacheShape, addresses: Sequence[int], memory: object) -> None:
        if len(addresses) != shape.tensors:
            raise EngineError(
                f"A cache of {shape.layers} layers needs {shape.tensors} buffers, but "
                f"{len(addresses)} were given; allocate a key and a value for each layer."
            )
        self.shape = shape
        self._addresses = tuple(addresses)
        self._memory = memory
        self._length = 0

    @property
    def length(self) -> int:
        """Rows filled."""
        return self._length

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.shape.capacity

    @property
    def past_shape(self) -> tuple[int, ...]:
        """Shape that a tensor of the past is bound with."""
        return self.shape.buffer if self._is_fixed else self.shape.rows(self._length)

    def new_shape(self, count: int) -> tuple[int, ...]:
        """Shape that a cache output of the graph is bound with, for ``count`` new rows."""
        return self.shape.buffer if self._is_fixed else self.shape.rows(count)

    def past_address(self, tensor: int) -> int:
        """Where a tensor's buffer starts; never null, even when no row is filled."""
        return self._addresses[tensor]

    def new_address(self, tensor: int) -> int:
        """Where the graph's output goes: behind the filled rows; the past itself if fixed."""
        offset = 0 if self._is_fixed else self._length * self.shape.row_bytes
        return self._addresses[tensor] + offset

    @property
    def _is_fixed(self) -> bool:
        return self.shape.form == "fixed"

    @abstractmethod
    def read_rows(self, tensor: int, start: int, stop: int) -> CacheArray:
        """A copy [stop - start, H_kv, head_dim] of filled rows of a tensor.

        Raises:
            EngineError: they are not all filled.
        """

    @abstractmethod
    def write_rows(self, tensor: int, start: int, rows: CacheArray) -> None:
        """Put ``rows`` [n, H_kv, head_dim] at position ``start``; ``length`` stays as it is.

        Raises:
            EngineError: they are of another size or dtype, or go beyond the capacity.
        """

    def clear_behind(self) -> None:
        """After a failed run: leave nothing behind the filled rows that masking lets pass."""
        if not self._is_fixed:
            return
        shape = self.shape
        zeros = np.zeros(shape.rows(shape.capacity - self._length), shape.dtype)
        for tensor in range(shape.tensors):
            self.write_rows(tensor, self._length, zeros)

    def _check_filled(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._length:
            raise EngineError(
                f"Rows {start} to {stop} of the KV cache were asked for, but it holds "
                f"{self._length}; ask for filled rows."
            )

    def _check_rows(self, start: int, rows: CacheArray) -> None:
        shape = self.shape
        fits = rows.shape == shape.rows(len(rows)) and rows.dtype == shape.dtype
        if not fits or not 0 <= start <= shape.capacity - len(rows):
            raise EngineError(
                f"Rows {list(rows.shape)} of {rows.dtype} do not fit at position {start} of a "
                f"KV cache of {shape.capacity} rows [{shape.heads}, {shape.head_dim}] of "
                f"{shape.dtype}; make them with the same model."
            )

    def require_room(self, count: int) -> None:
        """Check that ``count`` more rows fit.

        Raises:
            EngineError: they do not, or ``count`` is negative.
        """
        if not 0 <= count <= self.capacity - self._length:
            raise EngineError(
                f"The KV cache holds {self._length} of {self.capacity} positions, so {count} "
                "more cannot be added; shorten the prompt or start a new conversation."
            )

    def advance(self, count: int) -> None:
        """Count the ``count`` rows behind the filled ones, which have been written, as filled.

        Raises:
            EngineError: they go beyond the capacity.
        """
        self.require_room(count)
        self._length += count

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` rows; the others will be written over.

        Raises:
            EngineError: there are not so many.
        """
        if not 0 <= length <= self._length:
            raise EngineError(
                f"The KV cache holds {self._length} positions and cannot be cut to {length}; "
                f"give 0 to {self._length}."
            )
        self._length = length


class HostKvCache(KvCache):
    """A cache in this process's memory, readable as numpy arrays.

    Rows that were never written take no memory.
    """

    def __init__(self, shape: CacheShape) -> None:
        arrays = [zeros_on_demand(shape.buffer, shape.dtype) for _ in range(shape.tensors)]
        super().__init__(shape, [array.ctypes.data for array in arrays], arrays)
        self._rows = [shape.as_rows(array) for array in arrays]

    def past(self, tensor: int) -> CacheArray:
        """The filled rows of a tensor: a view [length, H_kv, head_dim]."""
        return self._rows[tensor][: self.length]

    def new(self, tensor: int, count: int) -> CacheArray:
        """The ``count`` rows behind the filled ones: a view [count, H_kv, head_dim].

        Raises:
            EngineError: they go beyond the capacity.
        """
        self.require_room(count)
        return self._rows[tensor][self.length : self.length + count]

    def read_rows(self, tensor: int, start: int, stop: int) -> CacheArray:
        """As :meth:`KvCache.read_rows`."""
        self._check_filled(start, stop)
        rows: CacheArray = self._rows[tensor][start:stop].copy()
        return rows

    def write_rows(self, tensor: int, start: int, rows: CacheArray) -> None:
        """As :meth:`KvCache.write_rows`."""
        self._check_rows(start, rows)
        self._rows[tensor][start : start + len(rows)] = rows
