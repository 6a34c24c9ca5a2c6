"""Scales of channels: planted outliers are found, and no choice is worse than none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.calibration.activation_statistics import row_statistics
from mvlm_export.calibration.scale_search import (
    search_activation_scales,
    search_weight_scales,
)
from mvlm_export.calibration.weight_grids import WeightFormat, fit_grid

INT8, INT4 = WeightFormat(8), WeightFormat(4, 32)
WIDTH = 96
OUTLIERS = [5, 40, 77]


def weights_of(*columns, seed=1):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((WIDTH, n)).astype(np.float32) * 0.05 for n in columns]


def rows_of(size=30.0, rows=200, seed=0):
    """Normal rows with a few channels ``size`` times larger, seen in two pieces."""
    values = np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)
    values[:, OUTLIERS] *= np.float32(size)
    return [values[:70], values[70:]]


def product_error(rows, weights, form, scales, inputs):
    """Of the product with weights on their grid, and inputs if asked for, in float64."""
    x = np.concatenate(rows).astype(np.float64)
    off = whole = 0.0
    for weight in weights:
        scaled = (weight * scales[:, None]).astype(np.float32)
        seen = x / scales
        if inputs:
            step = np.abs(seen).max() / 127
            seen = np.rint(seen / step) * step
        exact = x @ weight.astype(np.float64)
        off += np.square(seen @ fit_grid(scaled, form).round(scaled) - exact).sum()
        whole += np.square(exact).sum()
    return off / whole


SEARCHES = {
    "awq": (search_weight_scales, INT4, False),
    "smooth": (search_activation_scales, INT8, True),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_planted_outliers_are_found(name):
    search, form, inputs = SEARCHES[name]
    rows, weights = rows_of(), weights_of(64, 32)
    choice = search(row_statistics("x", rows), weights, [form, form])
    assert set(np.argsort(choice.scales)[-3:]) == set(OUTLIERS)
    others = np.delete(choice.scales, OUTLIERS)
    assert choice.scales[OUTLIERS].min() > 1.5 * others.max()
    assert choice.exponent > 0
    assert np.exp(np.log(choice.scales).mean()) == pytest.approx(1, rel=1e-5)
    without = product_error(rows, weights, form, np.ones(WIDTH), inputs)
    assert product_error(rows, weights, form, choice.scales, inputs) < 0.5 * without


@pytest.mark.parametrize("name", SEARCHES)
def test_its_measure_is_the_error_of_the_product(name):
    """Of the sample of rows, which here is all of them."""
    search, form, inputs = SEARCHES[name]
    rows, weights = rows_of(), weights_of(48)
    choice = search(row_statistics("x", rows), weights, [form])
    for scales, error in ((np.ones(WIDTH), choice.plain_error), (choice.scales, choice.error)):
        assert product_error(rows, weights, form, scales, inputs) == pytest.approx(
            error, rel=2e-3
        )


@settings(max_examples=20)
@given(
    st.sampled_from(sorted(SEARCHES)),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 300.0]),
    st.integers(1, 40),
)
def test_no_choice_is_worse_than_none(name, seed, size, count):
    search, form, _ = SEARCHES[name]
    rows = row_statistics("x", rows_of(size, rows=70 + count, seed=seed))
    choice = search(rows, weights_of(24, 8, seed=seed + 1), [form, form])
    assert choice.error <= choice.plain_error
    assert choice.scales.dtype == np.float32
    assert np.isfinite(choice.scales).all()
    assert (choice.scales > 0).all()
    if choice.error == choice.plain_error:
        assert (choice.scales == 1).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_dead_channels_and_zero_weights(name):
    """All-zero rows, channels and columns: no NaN, and scales that float16 holds."""
    search, form, _ = SEARCHES[name]
    rows, weights = rows_of(), weights_of(16)
    for piece in rows:
        piece[:, 10:20] = 0
    weights[0][30] = 0
    weights[0][:, 3] = 0
    choice = search(row_statistics("x", rows), weights, [form])
    assert choice.error <= choice.plain_error < 1
    assert 2**-10 <= choice.scales.min() <= choice.scales.max() <= 2**10
    zero = [np.zeros((5, WIDTH), np.float32)]
    assert (search(row_statistics("x", zero), weights, [form]).scales == 1).all()
