"""Figures of rows against plain numpy in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.calibration.activation_statistics import (
    EXTREME_ROWS,
    SAMPLE_ROWS,
    row_statistics,
)
from mvlm_export.engines.errors import InputError


def pieces_of(*lengths, width=6, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal((n, width)).astype(np.float32) for n in lengths]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
def test_figures_are_those_of_all_rows(lengths):
    pieces = pieces_of(*lengths)
    rows = np.concatenate(pieces).astype(np.float64)
    found = row_statistics("x", pieces, hessian=True)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.square, (rows**2).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.mean, np.abs(rows).mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.largest, np.abs(rows).max(axis=0))
    np.testing.assert_array_equal(found.sample, rows)
    assert {a.dtype.name for a in (found.hessian, found.square, found.mean)} == {"float32"}


def test_the_diagonal_of_the_hessian_is_the_mean_square():
    found = row_statistics("x", pieces_of(200, 30), hessian=True)
    np.testing.assert_allclose(np.diagonal(found.hessian), found.square, rtol=1e-5)


def test_no_hessian_unless_it_is_asked_for():
    assert row_statistics("x", pieces_of(3)).hessian is None


def test_a_sample_of_many_rows_is_spread_evenly():
    counted = np.arange(4 * SAMPLE_ROWS, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    found = row_statistics("x", [counted[:100], counted[100:103], counted[103:]]).sample
    assert found.shape == (SAMPLE_ROWS, 2)
    assert (found[0, 0], found[-1, 0]) == (0, 4 * SAMPLE_ROWS - 1)
    assert set(np.diff(found[:, 0])) <= {4.0, 5.0}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    pieces = pieces_of(3, 4)
    pieces[1][2, 5] = bad
    with pytest.raises(InputError, match=r"values in 'mlp.in' that are not finite.*--recipe"):
        row_statistics("mlp.in", pieces)


@pytest.mark.parametrize("pieces", [[], pieces_of(0), pieces_of(0, 0)])
def test_no_rows(pieces):
    with pytest.raises(InputError, match=r"No rows reach 'x'\. Give samples"):
        row_statistics("x", pieces)


@pytest.mark.parametrize("lengths", [(700,), (40, 600, 100), (1000, 7)])
def test_the_widest_rows_beside_the_sample_are_kept(lengths):
    pieces = pieces_of(*lengths)
    found = row_statistics("x", pieces)
    sampled = {row.tobytes() for row in found.sample}
    others = [row for row in np.concatenate(pieces) if row.tobytes() not in sampled]
    order = np.argsort([np.abs(row).max() for row in others])[-EXTREME_ROWS:]
    np.testing.assert_array_equal(found.extremes, [others[i] for i in sorted(order)])


def test_a_sample_of_all_rows_leaves_no_others():
    assert row_statistics("x", pieces_of(SAMPLE_ROWS)).extremes.shape == (0, 6)


def test_weighted_rows_stand_for_all():
    statistics = row_statistics("x", pieces_of(3000, 2000))
    sample, counts = statistics.weighted_sample()
    assert counts.sum() == pytest.approx(5000)
    assert len(sample) == len(counts) == SAMPLE_ROWS + EXTREME_ROWS
    assert (counts[-EXTREME_ROWS:] == 1).all()
