"""The append-only, sequence-major cache of keys and values.

Each tensor is laid out [capacity, H_kv, head_dim] and allocated once, so the first T rows and
the rows right behind them are both contiguous. A backend binds the past to the start of the
buffer and the graph's new rows to the address behind it: nothing is ever moved. The
book-keeping needs addresses only, so it is the same for host memory and for a GPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import EngineError

CacheArray = npt.NDArray[np.floating[Any]]


def cache_names(prefix: str, layers: int) -> list[str]:
    """``{prefix}.{n}.key`` and ``.value`` of each layer, in the decoder's order."""
    return [f"{prefix}.{n}.{part}" for n in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class CacheShape:
    """Size of a cache; tensors are numbered key 0, value 0, key 1, value 1, ...

    Attributes:
        capacity: most rows (positions) it can hold.
        dtype: numpy's name of the element type, ``float32`` or ``float16``.
    """

    layers: int
    heads: int
    head_dim: int
    capacity: int
    dtype: str

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

    def rows(self, count: int) -> tuple[int, int, int]:
        """Shape of ``count`` rows of one tensor."""
        return count, self.heads, self.head_dim


class KvCache:
    """Which rows of the buffers are filled, and where the next ones go.

    Args:
        shape: its size.
        addresses: start of each tensor's buffer, of ``capacity`` rows each.
        memory: what owns the buffers; held so that they live as long as the cache.
    """

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

    def past_address(self, tensor: int) -> int:
        """Where the filled rows of a tensor start; never null, even when there are none."""
        return self._addresses[tensor]

    def new_address(self, tensor: int) -> int:
        """Where the next row of a tensor goes: right behind the filled ones."""
        return self._addresses[tensor] + self._length * self.shape.row_bytes

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
    """A cache in this process's memory, readable as numpy arrays."""

    def __init__(self, shape: CacheShape) -> None:
        arrays = [
            np.empty(shape.rows(shape.capacity), shape.dtype) for _ in range(shape.tensors)
        ]
        super().__init__(shape, [array.ctypes.data for array in arrays], arrays)
        self._arrays = arrays

    def past(self, tensor: int) -> CacheArray:
        """The filled rows of a tensor: a view [length, H_kv, head_dim]."""
        return self._arrays[tensor][: self.length]

    def new(self, tensor: int, count: int) -> CacheArray:
        """The ``count`` rows behind the filled ones: a view [count, H_kv, head_dim].

        Raises:
            EngineError: they go beyond the capacity.
        """
        self.require_room(count)
        return self._arrays[tensor][self.length : self.length + count]
