"""Choose the scales of channels that :mod:`.smoothing` moves.

AWQ (arXiv 2306.00978), for weights of few bits: channels that carry large activations get
finer grids,

    s_k = mean|x_k|^a,    a in 0 .. 1 by the smallest  ||x W - (x / s) Q(diag(s) W)||

SmoothQuant (arXiv 2211.10438), for activations of 8 bits:

    s_k = max|x_k|^a / max_n|W_kn|^(1 - a)

where a is not fixed here, as it is in the paper, but chosen likewise: by the error of the
product with both sides on their grids. Scales are normalised to a geometric mean of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .activation_statistics import RowStatistics, some_columns
from .weight_grids import FloatArray, WeightFormat, fit_grid

STEPS = 20
"""Values of a that are tried, between 0 and 1."""

_LEAST = 1e-4
"""Relative to the mean: channels that are all but dead take this."""

_LARGEST = 2.0**10
"""Scales go from its inverse to it, so that float16 holds what they divide and multiply."""


@dataclass(frozen=True, eq=False)
class ScaleChoice:
    """Scales of one site.

    Attributes:
        scales: float32 [K].
        exponent: a.
        error: of the product, relative to its size.
        plain_error: the same without scales.
    """

    scales: FloatArray
    exponent: float
    error: float
    plain_error: float


def search_weight_scales(
    rows: RowStatistics, weights: Sequence[FloatArray], forms: Sequence[WeightFormat]
) -> ScaleChoice:
    """AWQ's choice for the layers [K, N_i] that read one tensor."""
    importance = _bounded(rows.mean)

    def scales(exponent: float) -> FloatArray:
        return _normalised(importance**exponent)

    def product(factors: FloatArray, weight: FloatArray, form: WeightFormat) -> FloatArray:
        scaled = weight * factors[:, None]
        rounded = fit_grid(scaled, form).round(scaled)
        inputs: FloatArray = rows.sample / factors
        return inputs @ rounded

    ones = np.ones((len(rows.sample), 1), np.float32)
    return _search(rows.sample, ones, weights, forms, scales, product)


def search_activation_scales(
    rows: RowStatistics, weights: Sequence[FloatArray], forms: Sequence[WeightFormat]
) -> ScaleChoice:
    """SmoothQuant's choice, with activations on one 8-bit grid for the whole tensor."""
    sample, counts = rows.weighted_sample()
    largest = _bounded(rows.largest)
    strongest = _bounded(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0))

    def scales(exponent: float) -> FloatArray:
        factors: FloatArray = largest**exponent / strongest ** (1 - exponent)
        return _normalised(factors)

    def product(factors: FloatArray, weight: FloatArray, form: WeightFormat) -> FloatArray:
        scaled = weight * factors[:, None]
        rounded = fit_grid(scaled, form).round(scaled)
        step = float((rows.largest / factors).max()) / 127 or 1.0
        steps = np.rint(sample / factors / step).clip(-127, 127)
        result: FloatArray = (steps @ rounded) * step
        return result

    return _search(sample, counts, weights, forms, scales, product)


def _search(
    rows: FloatArray,
    counts: FloatArray,
    weights: Sequence[FloatArray],
    forms: Sequence[WeightFormat],
    scales: Callable[[float], FloatArray],
    product: Callable[[FloatArray, FloatArray, WeightFormat], FloatArray],
) -> ScaleChoice:
    """Try every a; ``counts`` [M, 1] says how many rows each of ``rows`` stands for."""
    weights = [some_columns(weight) for weight in weights]
    wanted = [rows @ weight for weight in weights]

    def sum_squares(product: FloatArray) -> float:
        return float((np.square(product, dtype=np.float64) * counts).sum())

    size = sum(sum_squares(part) for part in wanted) or 1.0

    def error(factors: FloatArray) -> float:
        total = 0.0
        for weight, form, part in zip(weights, forms, wanted, strict=True):
            total += sum_squares(product(factors, weight, form) - part)
        return total / size

    ones = np.ones(len(weights[0]), np.float32)
    plain = error(ones)
    best = ScaleChoice(ones, 0.0, plain, plain)
    for step in range(STEPS + 1):
        exponent = step / STEPS
        factors = scales(exponent)
        found = error(factors)
        if found < best.error:
            best = ScaleChoice(factors, exponent, found, plain)
    return best


def _bounded(values: FloatArray) -> FloatArray:
    least = max(float(values.mean()) * _LEAST, 1e-8)
    bounded: FloatArray = np.maximum(values, np.float32(least)).astype(np.float32)
    return bounded


def _normalised(factors: FloatArray) -> FloatArray:
    mean = np.exp(np.log(factors, dtype=np.float64).mean())
    normalised: FloatArray = (factors / mean).clip(_LARGEST**-1, _LARGEST).astype(np.float32)
    return normalised
