"""The clip that a product loses least by: against every share tried by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.calibration.activation_statistics import (
    SAMPLE_ROWS,
    row_statistics,
)
from mvlm_export.calibration.product_clip import SHARES, product_clip

WIDTH = 48


def draw(rows, seed, tail=0.0):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((rows, WIDTH))
    return (values * np.exp(tail * generator.standard_normal(values.shape))).astype(np.float32)


def weight_of(seed=1, columns=32):
    return np.random.default_rng(seed).standard_normal((WIDTH, columns)).astype(np.float32)


def product_error(x, weight, amax):
    """In float64, over all rows."""
    step = amax / 127
    off = np.rint(x / step).clip(-127, 127) * step - x.astype(np.float64)
    return np.square(off @ weight).sum()


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, SAMPLE_ROWS),
    tail=st.floats(0, 1.5),
)
@settings(max_examples=30, deadline=None)
def test_no_other_share_loses_less(seed, rows, tail):
    x, weight = draw(rows, seed, tail), weight_of(seed + 1)
    found = product_clip(row_statistics("x", [x]), weight)
    largest = np.abs(x).max()
    errors = [product_error(x, weight, share * largest) for share in SHARES]
    assert found / largest == pytest.approx(SHARES[int(np.argmin(errors))])


def test_a_value_that_the_weight_ignores_is_clipped_and_one_that_counts_is_kept():
    x, weight = draw(300, 0), weight_of()
    x[:, 7] *= 40
    weight[7] = 0
    assert product_clip(row_statistics("x", [x]), weight) < 0.2 * np.abs(x).max()
    weight[7] = 20
    assert product_clip(row_statistics("x", [x]), weight) > 0.8 * np.abs(x).max()


def test_one_row_that_a_sample_would_miss_is_seen():
    """A token far above all others, between the rows of an even sample."""
    x = draw(4 * SAMPLE_ROWS, 2)
    x[18] *= 60
    assert not (row_statistics("x", [x]).sample == x[18]).all(axis=1).any()
    found = product_clip(row_statistics("x", [x]), weight_of())
    errors = {s: product_error(x, weight_of(), s * np.abs(x).max()) for s in (0.1, 1.0)}
    assert errors[1.0] < errors[0.1]
    assert product_error(x, weight_of(), found) < 1.02 * errors[1.0]


def test_zeros_have_a_range_of_zero():
    rows = row_statistics("x", [np.zeros((5, WIDTH), np.float32)])
    assert product_clip(rows, weight_of()) == 0
