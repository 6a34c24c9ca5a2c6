"""Where to clip magnitudes before they are put on the int8 grid, from their histogram.

``percentile_clip`` keeps a share of the values. ``entropy_clip`` and ``mse_clip`` weigh what
is clipped against what is rounded: by the Kullback-Leibler divergence, and by the squared
error.

**Entropy** (Migacz, "8-bit Inference with TensorRT", GTC 2017). The first i bins, h_j each,
are kept. P is h with all that lies beyond added to its last bin; Q is what is left when those
bins are merged evenly into 128 levels and each level is spread again over its bins that are
not empty: q_j = c_l / m_l, for c_l values in m_l such bins. With N values in all and n inside,

    KL(P || Q)  =  sum_j P_j / N log((P_j / N) / (q_j / n))
                =  log(n / N) + 1/N [ sum_j P_j log P_j - sum_l c_l log(c_l / m_l)
                                      - (N - n) log q_last ]

so prefix sums of h, of h log h and of the bins that are not empty give it for every i at once.
Two details are those of known implementations: zeros are exact on any grid, so bin 0 is given
the count of bin 1 (NVIDIA's pytorch-quantization; without it, ReLU and sparse tensors lose
most of their range), and an empty last bin counts as 1e-4 values in Q (MXNet, ONNX Runtime),
where zero would forbid to clip there and one outlier would set the range.

**Squared error.** With scale s = amax / 127, values of ((l - 1/2) s, (l + 1/2) s] become l s,
and all beyond 126.5 s become amax. With D0, D1, D2 the number, sum and sum of squares of the
values there, the error is ``sum_l D2 - 2 l s D1 + (l s)^2 D0``. Values are taken as spread
evenly within a bin.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from .magnitude_histogram import MagnitudeHistogram

Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ENTROPY_LEVELS = 128
TOP_LEVEL = 127
EMPTY_COUNT = 1e-4
MSE_RATIO = 0.99
"""Each clip that is tried is this share of the one before."""


def percentile_clip(histogram: MagnitudeHistogram, percentile: float) -> float:
    """The smallest bin edge that ``percentile`` per cent of the values lie below."""
    counts = histogram.counts
    needed = math.ceil(Fraction(str(percentile)) / 100 * int(counts.sum()))
    place = int(np.searchsorted(np.cumsum(counts), needed))
    return min((place + 1) * histogram.width, histogram.largest)


def entropy_clip(histogram: MagnitudeHistogram) -> float:
    """The bin edge of least divergence; the largest of several.

    The histogram needs 2 * ``ENTROPY_LEVELS`` bins at least.
    """
    if not histogram.width:
        return 0.0
    counts = histogram.counts[: histogram.filled].astype(np.float64)
    counts[0] = counts[1]
    divergences = _divergences(counts)
    kept = len(counts) - int(np.argmin(divergences[::-1]))
    return min(kept * histogram.width, histogram.largest)


def _divergences(counts: Float64Array) -> Float64Array:
    """KL of keeping the first 128, 129, ... all bins."""
    kept = np.arange(ENTROPY_LEVELS, counts.size + 1)
    starts = -(-kept[:, None] * np.arange(ENTROPY_LEVELS + 1) // ENTROPY_LEVELS)
    level = np.diff(_sums(counts)[starts], axis=1)
    mean = level / np.maximum(np.diff(_sums(counts > 0)[starts], axis=1), 1)
    inside = _sums(counts)[kept]
    total = counts.sum()
    outside = total - inside
    last = counts[kept - 1]
    log_last = np.log(np.where(last > 0, mean[:, -1], EMPTY_COUNT))
    own = _sums(_times_log(counts, counts))[kept - 1] + _times_log(
        last + outside, last + outside
    )
    parted = own - _times_log(level, mean).sum(axis=1) - outside * log_last
    shares = np.log(np.maximum(inside, EMPTY_COUNT) / total) + parted / total
    return np.where(inside > 0, shares, np.inf)


def mse_clip(histogram: MagnitudeHistogram) -> float:
    """The clip of least squared rounding error; steps finer than two bins are not tried."""
    if not histogram.width:
        return 0.0
    counts = histogram.counts[: histogram.filled].astype(np.float64)
    top = histogram.largest / histogram.width
    tried = int(math.log(2 * TOP_LEVEL / top) / math.log(MSE_RATIO)) + 1
    clips = top * np.power(MSE_RATIO, np.arange(max(tried, 1), dtype=np.float64))
    best = int(np.argmin(_squared_errors(counts, clips)))
    return min(float(clips[best]) * histogram.width, histogram.largest)


def _squared_errors(counts: Float64Array, clips: Float64Array) -> Float64Array:
    """Of each clip; all in units of a bin."""
    steps = (clips / TOP_LEVEL)[:, None]
    levels = np.arange(TOP_LEVEL + 1)
    bounds = np.minimum((levels[1:] - 0.5) * steps, counts.size)
    full = np.full_like(steps, counts.size)
    edges = np.concatenate([np.zeros_like(steps), bounds, full], axis=1)
    number, first, second = (
        np.diff(_moment_below(counts, edges, power), axis=1) for power in range(3)
    )
    values = levels * steps
    errors: Float64Array = (second - 2 * values * first + values**2 * number).sum(axis=1)
    return errors


def _moment_below(counts: Float64Array, edges: Float64Array, power: int) -> Float64Array:
    """Sum of x ** power over values below each edge; bins are one wide."""
    whole = np.minimum(edges.astype(np.int64), counts.size - 1)
    grown = np.arange(counts.size + 1.0) ** (power + 1)
    before = _sums(counts * np.diff(grown))[whole]
    part: Float64Array = before + counts[whole] * (edges ** (power + 1) - grown[whole])
    return part / (power + 1)


def _sums(values: npt.NDArray[np.bool_] | Float64Array) -> Float64Array:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _times_log(factor: Float64Array, values: Float64Array) -> Float64Array:
    """``factor * log(values)``; 0 where ``values`` is 0."""
    logs: Float64Array = np.log(np.where(values > 0, values, 1.0))
    return factor * logs
