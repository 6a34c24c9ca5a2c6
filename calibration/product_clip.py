"""Clip a tensor where the product that reads it loses least.

    amax = argmin  sum over rows ||(Q(x) - x) W||^2
    Q(x) = s clip(round(x / s), -127, 127),    s = amax / 127

A squared error of the values themselves counts them all alike. But the few tokens whose values
set the range (vision transformers and decoders have such tokens) are read by all others, and
what they lose shows in the product.
"""

from __future__ import annotations

import numpy as np

from .activation_statistics import RowStatistics, some_columns
from .weight_grids import FloatArray

SHARES = tuple(share / 20 for share in range(20, 1, -1))
"""Of the largest magnitude, that are tried: 1 down to 0.1."""


def product_clip(rows: RowStatistics, weight: FloatArray) -> float:
    """The magnitude to clip x at before ``x @ weight``.

    Args:
        rows: of x [M, K].
        weight: [K, N].
    """
    largest = float(rows.largest.max())
    sample, counts = rows.weighted_sample()
    columns = some_columns(weight)
    best, least = largest, np.inf
    for share in SHARES:
        step = share * largest / 127 or 1.0
        off = np.rint(sample / step).clip(-127, 127) * step - sample
        error = float((np.square(off @ columns) * counts).sum(dtype=np.float64))
        if error < least:
            best, least = share * largest, error
    return best
