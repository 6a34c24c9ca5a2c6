"""Integer grids for weights [K, N]: one scale a column, or one for each block of rows.

    w[k, n]  =  q[k, n] s[g(k), n]  (+ m[g(k), n]),     g(k) = k // group_size

with q in -127..127 for 8 bits and -8..7 for 4. TensorRT takes zero points of 0 alone, so an
asymmetric grid has a float offset m instead of one: :mod:`.write_quantization` adds the
correction ``blocksum(x) @ m`` to the product. K need be no multiple of the group size: the
last block is shorter, as ONNX allows, though TensorRT does not (see ``for_rows``).

Scales are rounded to float16 before they are used, so that the float16 graph divides and
multiplies by the same number, and are never zero or below float16's normal range: TensorRT
asserts positive scales, and the conversion to float16 holds every scale to 1e-3 of itself.
Offsets are rounded before the scales are chosen, so that the grid reaches to both ends of a
block that lies far from zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.errors import InputError

FloatArray = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]
Bits = Literal[4, 8]
Values = npt.NDArray[Any]

GROUP_SIZES = (32, 64, 128)
"""Rows that share a scale; what TensorRT and ONNX Runtime have fast kernels for."""

SMALLEST_SCALE = 2.0**-14
"""Float16's smallest normal number."""

LARGEST_SCALE = 65504.0
"""Float16's largest number."""

_LIMITS: dict[int, tuple[int, int]] = {4: (-8, 7), 8: (-127, 127)}


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored.

    Attributes:
        bits: 4 or 8.
        group_size: rows that share a scale, one of ``GROUP_SIZES``; None for one a column.
        symmetric: False adds an offset to each block.

    Raises:
        InputError: a combination that no target runs well.
    """

    bits: Bits
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in _LIMITS:
            raise InputError(f"Weights have 4 or 8 bits, not {self.bits}. Choose one of them.")
        if self.bits == 8 and (self.group_size is not None or not self.symmetric):
            raise InputError(
                "8-bit weights have one scale a column and no offset. Leave group_size out."
            )
        if self.bits == 4 and self.group_size not in GROUP_SIZES:
            raise InputError(
                f"4-bit weights need a group_size of {', '.join(map(str, GROUP_SIZES))}, not "
                f"{self.group_size}: with one scale a column TensorRT would dequantize the "
                "whole weight in each run."
            )

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return _LIMITS[self.bits]

    def for_rows(self, rows: int) -> WeightFormat:
        """This format with the largest group size up to its own that divides ``rows``.

        TensorRT takes whole blocks alone. The format itself, where no group size divides them.
        """
        if self.group_size is None or rows % self.group_size == 0:
            return self
        fitting = [g for g in GROUP_SIZES if g < self.group_size and rows % g == 0]
        return replace(self, group_size=max(fitting)) if fitting else self

    def groups(self, rows: int) -> int:
        """Number of scales down a column of ``rows``."""
        return 1 if self.group_size is None else -(-rows // self.group_size)

    def stored_bytes(self, rows: int, columns: int, scale_bytes: int = 2) -> int:
        """Bytes of a weight [rows, columns] with its scales and offsets."""
        codes = (rows * columns * self.bits + 7) // 8
        tables = 1 if self.symmetric else 2
        return codes + tables * self.groups(rows) * columns * scale_bytes

    def __str__(self) -> str:
        group = "" if self.group_size is None else f" g{self.group_size}"
        return f"int{self.bits}{group}{'' if self.symmetric else ' asym'}"


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """The grid of one weight.

    Attributes:
        scales: float32 [G, N], positive float16 numbers.
        offsets: float32 [G, N] of an asymmetric grid, else None.
    """

    form: WeightFormat
    scales: FloatArray
    offsets: FloatArray | None = None

    def quantize(self, weight: FloatArray) -> Codes:
        """Codes int8 [K, N] of a weight float32 [K, N], each rounded to the nearest."""
        blocks, (low, high) = in_blocks(weight, self.form), self.form.limits
        shifted = blocks if self.offsets is None else blocks - self.offsets[:, None]
        steps = shifted / self.scales[:, None]
        np.clip(np.rint(steps, out=steps), low, high, out=steps)
        codes: Codes = steps.astype(np.int8).reshape(-1, weight.shape[1])[: len(weight)]
        return codes

    def dequantize(self, codes: Codes) -> FloatArray:
        """float32 [K, N]."""
        values = in_blocks(codes, self.form).astype(np.float32)
        values *= self.scales[:, None]
        if self.offsets is not None:
            values += self.offsets[:, None]
        weight: FloatArray = values.reshape(-1, codes.shape[1])[: len(codes)]
        return weight

    def round(self, weight: FloatArray) -> FloatArray:
        """The nearest weight on the grid."""
        return self.dequantize(self.quantize(weight))

    def of_rows(self, start: int, stop: int) -> WeightGrid:
        """The grid of rows ``start`` to ``stop - 1``, which begin or lie in one block."""
        size = self.form.group_size
        if size is None:
            return self
        blocks = slice(start // size, (stop - 1) // size + 1)
        offsets = None if self.offsets is None else self.offsets[blocks]
        return WeightGrid(self.form, self.scales[blocks], offsets)


def fit_grid(
    weight: FloatArray, form: WeightFormat, clip: FloatArray | float = 1.0
) -> WeightGrid:
    """The grid that reaches from the smallest to the largest value of each block.

    Args:
        weight: float32 [K, N], finite.
        clip: float or [G, N]; the share of that range that is kept, at most 1. Values beyond
            are cut off: those far from zero, or from the middle of an asymmetric grid.
    """
    low, high = form.limits
    blocks = in_blocks(weight, form)
    if form.symmetric:
        largest = np.maximum(blocks.max(axis=1), -blocks.min(axis=1)) * clip
        return WeightGrid(form, safe_scales(largest / high))
    top, bottom = blocks.max(axis=1), blocks.min(axis=1)
    middle = top / 2 + bottom / 2
    half = (top / 2 - bottom / 2) * clip
    steps = 2 * half / (high - low)
    offsets = _as_float16(middle - steps * (low + high) / 2)
    ends = ((middle + half - offsets) / high, (middle - half - offsets) / low)
    return WeightGrid(form, safe_scales(np.maximum(*ends)), offsets)


def in_blocks(values: Values, form: WeightFormat) -> Values:
    """[K, N] as [G, rows of a block, N]; the last block is filled up with its last row."""
    rows, columns = values.shape
    size = form.group_size or rows
    missing = -rows % size
    if missing:
        values = np.pad(values, ((0, missing), (0, 0)), mode="edge")
    return values.reshape(-1, size, columns)


def safe_scales(scales: npt.NDArray[np.floating]) -> FloatArray:
    """Scales as positive normal float16 numbers, in float32."""
    return _as_float16(np.clip(scales, SMALLEST_SCALE, LARGEST_SCALE))


def _as_float16(values: npt.NDArray[np.floating]) -> FloatArray:
    """Rounded to float16's finite numbers, in float32."""
    bounded = np.clip(values, -LARGEST_SCALE, LARGEST_SCALE)
    rounded: FloatArray = bounded.astype(np.float16).astype(np.float32)
    return rounded
