"""Weights that are read when they are written: a 7B graph is rewritten in little memory.

A constant of a graph holds either an array (small) or :class:`DeferredValues`: a shape, a
dtype, and a function that gives the array. A rewrite that changes a weight makes a new
deferred constant out of old ones (:func:`derive`); nothing is computed until the graph is
saved, one tensor at a time. Never use ``gs.Constant.values`` on a weight: it keeps what it
loads. :func:`values_of` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from mvlm_export.engines.errors import PassError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

SMALL = 1024
"""Constants of at most so many bytes are computed at once when they are derived."""


class DeferredValues(LazyValues):  # type: ignore[misc]
    """Values of a constant that ``read`` gives each time they are asked for.

    Args:
        shape: of the array that ``read`` returns.
        dtype: of that array.
        read: makes the array; called when a graph is saved, and whenever values are examined.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[], Array]) -> None:  # noqa: ANN401
        self.shape: Shape = tuple(int(axis) for axis in shape)
        self.dtype = np.dtype(dtype)
        self._read = read

    @property
    def nbytes(self) -> int:
        """Bytes when written; two 4-bit values share one."""
        return stored_bytes(self.shape, self.dtype)

    @property
    def tensor(self) -> onnx.TensorProto:
        """A stand-in without data, as graph-surgeon's exporter asks for."""
        proto = onnx.TensorProto(
            dims=self.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(self.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        proto.external_data.add(key="location", value="deferred")
        return proto

    def load(self) -> Array:
        """The array.

        Raises:
            PassError: ``read`` gave another shape or dtype than was promised.
        """
        array = np.asarray(self._read())
        if array.shape != self.shape or array.dtype != self.dtype:
            raise PassError(
                f"A deferred weight came out as {array.dtype} {list(array.shape)}, but "
                f"{self.dtype} {list(self.shape)} was promised. This is a fault of the pass "
                "that made it; please report it."
            )
        return array

    def __str__(self) -> str:
        return f"DeferredValues (shape={self.shape}, dtype={self.dtype})"


def stored_bytes(shape: Sequence[int], dtype: Any) -> int:  # noqa: ANN401
    """Bytes of a tensor in a file."""
    count = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    if is_packed(dtype):
        return (count + 1) // 2
    return count * int(np.dtype(dtype).itemsize)


def is_packed(dtype: Any) -> bool:  # noqa: ANN401
    """Whether two values share a byte; graph-surgeon cannot write arrays of such a dtype."""
    proto_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return proto_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def values_of(constant: gs.Constant) -> Array:
    """The values of a constant, read now and not kept by it."""
    values = constant._values
    loaded: Array = values.load() if isinstance(values, LazyValues) else values
    return loaded


def is_deferred(constant: gs.Constant) -> bool:
    """Whether its values are read later."""
    return isinstance(constant._values, DeferredValues)


def derive(
    name: str,
    sources: Sequence[gs.Constant],
    compute: Callable[..., Array],
    shape: Sequence[int],
    dtype: Any = None,  # noqa: ANN401
) -> gs.Constant:
    """A constant computed from others, when it is needed.

    Args:
        name: of the new constant; see ``editing.fresh_name``.
        sources: whose values ``compute`` gets, in this order.
        compute: makes the array; must not keep or change what it gets.
        shape: of the result.
        dtype: of the result; that of the first source if None. The result is cast to it.
    """
    wanted = np.dtype(sources[0].dtype if dtype is None else dtype)
    # The sources' values are held, not the constants: a constant may be renamed or rebound.
    held = [source._values for source in sources]

    def read() -> Array:
        loaded = [v.load() if isinstance(v, LazyValues) else v for v in held]
        return np.asarray(compute(*loaded)).astype(wanted, copy=False)

    deferred = DeferredValues(shape, wanted, read)
    if is_packed(wanted):
        return gs.Constant(name, deferred)
    if deferred.nbytes <= SMALL and not any(isinstance(v, DeferredValues) for v in held):
        return gs.Constant(name, deferred.load())
    return gs.Constant(name, deferred)
