"""A histogram of ``|x|`` that grows with the data and never holds it.

Bins are ``width`` wide, from zero on, and ``width`` is the smallest power of two with which
all values fit: ``largest < bins * width``. When a larger value comes, the width doubles as
often as needed, and neighbours are added up in pairs. Dividing by a power of two is exact, so

    floor(|x| / 2w)  =  floor(floor(|x| / w) / 2)

and the counts are the same in whatever order and portions the values came. At least half of
the bins are in use: a bin is at most ``2 / bins`` of the largest value wide.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.errors import InputError

Values = npt.NDArray[np.floating[Any]]
Float32Array = npt.NDArray[np.float32]

PORTION = 2**20
"""Values that are worked on at a time."""


class MagnitudeHistogram:
    """Counts of magnitudes.

    Args:
        bins: a power of two.

    Attributes:
        counts: int64 [bins]; bin i counts ``i * width <= |x| < (i + 1) * width``.
        width: of a bin, a power of two; 0 while all values are zero.
        largest: the largest magnitude, exactly.
    """

    def __init__(self, bins: int) -> None:
        if bins < 2 or bins & (bins - 1):
            raise InputError(f"A histogram has a power of two of bins, not {bins}.")
        self.counts = np.zeros(bins, np.int64)
        self.width = 0.0
        self.largest = 0.0

    @property
    def filled(self) -> int:
        """Bins up to the one that holds the largest value."""
        return int(self.largest / self.width) + 1 if self.width else 1

    def add(self, values: Float32Array) -> None:
        """Count finite values of any shape, one at least."""
        self._make_room(float(np.maximum(values.max(), -values.min())))
        flat = values.reshape(-1)
        for start in range(0, flat.size, PORTION):
            self._count(flat[start : start + PORTION])

    def _count(self, values: Float32Array) -> None:
        if not self.width:
            self.counts[0] += values.size
            return
        shift = 1 - math.frexp(self.width)[1]
        places = np.ldexp(np.abs(values), shift).astype(np.intp)
        self.counts += np.bincount(places, minlength=self.counts.size)

    def _make_room(self, largest: float) -> None:
        if largest <= self.largest:
            return
        self.largest = largest
        bins = self.counts.size
        width = math.ldexp(1.0, math.frexp(largest)[1]) / bins
        merged = min(int(width / self.width), bins) if self.width else 1
        self.width = width
        if merged > 1:
            sums = self.counts.reshape(-1, merged).sum(axis=1)
            self.counts[: sums.size] = sums
            self.counts[sums.size :] = 0


def finite_floats(values: Values, tensor: str) -> Float32Array:
    """Values in float32, one at least.

    Raises:
        InputError: they are not floats, or hold NaN or infinity; ``tensor`` is named.
    """
    if not np.issubdtype(values.dtype, np.floating):
        raise InputError(
            f"{tensor!r} holds {values.dtype}, not floats: there is nothing to quantize. "
            "Leave it out."
        )
    with np.errstate(over="ignore"):
        single: Float32Array = values.astype(np.float32, copy=False)
    if not np.isfinite([single.min(), single.max()]).all():
        bad = single.size - int(np.count_nonzero(np.isfinite(single)))
        raise InputError(
            f"{bad} of {single.size} values of {tensor!r} are NaN or infinite, so no range "
            "fits them. Run the float32 model on the same samples (mvlm parity) and find "
            "where they come from."
        )
    return single
