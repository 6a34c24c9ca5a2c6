"""Rounding against brute force, a slow GPTQ of another form, and ONNX Runtime's quantizers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization.neural_compressor import weight_only

from mvlm_export.calibration.activation_statistics import row_statistics
from mvlm_export.calibration.weight_grids import WeightFormat, fit_grid
from mvlm_export.calibration.weight_rounding import (
    CLIPS,
    DAMPING,
    clip_grid,
    round_by_gptq,
    round_clipped,
    round_to_nearest,
)

FORMS = [
    WeightFormat(4, 32),
    WeightFormat(4, 128),
    WeightFormat(4, 64, symmetric=False),
    WeightFormat(8),
]
FOUR_BITS = FORMS[:3]


def weight_of(rows, columns, seed=0):
    """Heavy-tailed, so that clips matter."""
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.03
    return values.astype(np.float32)


def rows_of(count, width, seed=1, rank=12):
    """Correlated: most of what they hold lies in a few directions, with sizes of their own."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((count, rank)) @ generator.standard_normal(
        (rank, width)
    )
    values = (shared + 0.3 * generator.standard_normal((count, width))) * generator.lognormal(
        0, 0.7, width
    )
    return values.astype(np.float32)


def statistics_of(rows):
    return row_statistics("x", [rows], hessian=True)


def product_error(rows, weight, rounded):
    """``||X (W - Q)|| / ||X W||``, in float64."""
    wide = rows.astype(np.float64)
    off = wide @ (weight.astype(np.float64) - rounded)
    return float(np.linalg.norm(off) / np.linalg.norm(wide @ weight))


def reference_gptq(weight, grid, hessian, order):
    """Optimal brain quantization in the given order, from the paper's equation (2).

    Row by row in float64, with the inverse of what is left updated by Gaussian elimination:
    no Cholesky factor, no blocks.
    """
    remaining = weight.astype(np.float64)
    size = DAMPING * np.diagonal(hessian).mean()
    inverse = np.linalg.inv(hessian + size * np.eye(len(hessian)))
    codes = np.zeros(weight.shape, np.int8)
    left = list(order)
    while left:
        row = left.pop(0)
        cell = grid.of_rows(row, row + 1)
        code = cell.quantize(remaining[[row]].astype(np.float32))
        codes[row] = code[0]
        error = (remaining[row] - cell.dequantize(code)[0]) / inverse[row, row]
        remaining[left] -= np.outer(inverse[left, row], error)
        column = inverse[:, row].copy()
        inverse -= np.outer(column, column) / column[row]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("width", "count"), [(40, 300), (150, 400)])
def test_gptq_is_the_papers(width, count, form, act_order):
    """150 rows: two portions of 128 rows, and a last block that is shorter."""
    weight, statistics = weight_of(width, 9), statistics_of(rows_of(count, width))
    grid = clip_grid(weight, form, statistics.square)
    hessian = statistics.hessian.astype(np.float64)
    order = np.argsort(-np.diagonal(hessian), kind="stable") if act_order else range(width)
    expected = reference_gptq(weight, grid, hessian, order)
    found = round_by_gptq(weight, grid, statistics, act_order)
    assert found.grid is grid
    # A value that lies half-way between two codes may go either way, by float32's rounding.
    assert (found.codes != expected).mean() < 0.005
    assert (found.codes != grid.quantize(weight)).mean() > 0.1


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("width", [96, 300])
def test_gptq_beats_rounding_to_nearest(form, width):
    weight, rows = weight_of(width, 40), rows_of(2000, width)
    statistics, fresh = statistics_of(rows[:600]), rows[600:]
    grid = clip_grid(weight, form, statistics.square)
    errors = {
        "nearest": product_error(fresh, weight, grid.round(weight)),
        "gptq": product_error(
            fresh, weight, round_by_gptq(weight, grid, statistics).dequantize()
        ),
    }
    assert errors["gptq"] < 0.25 * errors["nearest"]


def test_gptq_of_uncorrelated_inputs_is_rounding_to_nearest():
    """A diagonal Hessian moves no error."""
    weight = weight_of(64, 8)
    statistics = statistics_of(np.diag(np.arange(1.0, 65)).astype(np.float32))
    for form in FORMS:
        grid = fit_grid(weight, form)
        found = round_by_gptq(weight, grid, statistics)
        np.testing.assert_array_equal(found.codes, grid.quantize(weight))


@settings(max_examples=30)
@given(
    st.sampled_from(FORMS),
    st.integers(1, 80),
    st.integers(1, 60),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    st.integers(0, 10**6),
)
def test_gptq_of_few_rows_and_dead_channels(form, width, count, size, seed):
    """Fewer rows than channels, channels of zeros, nothing but zeros."""
    generator = np.random.default_rng(seed)
    rows = rows_of(count, width, seed) * np.float32(size)
    rows[:, generator.random(width) < 0.3] = 0
    weight = weight_of(width, 4, seed)
    grid = fit_grid(weight, form)
    with np.errstate(all="raise", under="ignore"):
        found = round_by_gptq(weight, grid, statistics_of(rows))
    low, high = form.limits
    assert low <= found.codes.min() <= found.codes.max() <= high
    dead = ~rows.any(axis=0)
    np.testing.assert_array_equal(found.codes[dead], grid.quantize(weight)[dead])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_to_nearest(form):
    weight = weight_of(100, 6)
    found = round_to_nearest(weight, form)
    np.testing.assert_array_equal(found.codes, fit_grid(weight, form).quantize(weight))
    np.testing.assert_array_equal(found.grid.scales, fit_grid(weight, form).scales)


def weighted_errors(weight, grid, square):
    """Of each block, by the measure of clips, in float64."""
    off = np.square(weight.astype(np.float64) - grid.round(weight)) * square[:, None]
    size = grid.form.group_size or len(weight)
    starts = np.arange(0, len(weight), size)
    return np.add.reduceat(off, starts, axis=0)


@settings(max_examples=40)
@given(st.sampled_from(FORMS), st.integers(1, 150), st.integers(0, 10**6), st.booleans())
def test_no_clip_is_worse_than_none(form, width, seed, weighted):
    weight = weight_of(width, 5, seed)
    square = np.random.default_rng(seed).lognormal(0, 1, width).astype(np.float32)
    found = clip_grid(weight, form, square if weighted else None)
    measure = square if weighted else np.ones(width)
    before = weighted_errors(weight, fit_grid(weight, form), measure)
    after = weighted_errors(weight, found, measure)
    assert (after <= before * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_clips_are_the_best_of_those_tried(form):
    weight = weight_of(96, 12)
    square = np.random.default_rng(2).lognormal(0, 1, 96).astype(np.float32)
    found = weighted_errors(weight, clip_grid(weight, form, square), square)
    tried = [weighted_errors(weight, fit_grid(weight, form, clip), square) for clip in CLIPS]
    np.testing.assert_allclose(found, np.min(tried, axis=0), rtol=1e-4)
    whole = weighted_errors(weight, fit_grid(weight, form), square)
    if form.bits == 4:
        assert found.sum() < 0.95 * whole.sum()


def test_clips_spare_what_matters():
    """A weight of a strong channel is not cut off, the same weight of a weak one is."""
    weight = np.full((32, 2), 0.01, np.float32)
    weight[::2] *= -0.7
    weight[0, 0] = weight[1, 1] = 0.1
    square = np.where(np.arange(32) == 0, 1e4, 1.0).astype(np.float32)
    form = WeightFormat(4, 32)
    scales = clip_grid(weight, form, square).scales[0] / fit_grid(weight, form).scales[0]
    assert scales[0] > 0.9
    assert scales[1] < 0.9
    found = round_clipped(weight, form, square)
    np.testing.assert_array_equal(found.grid.scales, clip_grid(weight, form, square).scales)
    np.testing.assert_array_equal(found.codes, found.grid.quantize(weight))


def theirs(weight, size):
    """ONNX Runtime's rounding to nearest in blocks of rows, with codes of -8 to 7."""
    rows, columns = weight.shape
    blocks = weight.reshape(-1, size, columns).transpose(0, 2, 1).reshape(-1, size)
    codes, scale, zero = weight_only.quant_tensor(blocks.copy(), 4, size, "sym", "int")
    values = (codes.astype(np.float64) - zero) * scale
    return values.reshape(-1, columns, size).transpose(0, 2, 1).reshape(rows, columns)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_weights_lie_as_near_as_onnx_runtimes(size):
    weight, form = weight_of(512, 24), WeightFormat(4, size)
    bound = np.linalg.norm(theirs(weight, size) - weight)
    nearest = np.linalg.norm(round_to_nearest(weight, form).dequantize() - weight)
    clipped = np.linalg.norm(round_clipped(weight, form).dequantize() - weight)
    assert nearest < 1.1 * bound
    assert clipped < bound


@pytest.mark.parametrize("size", [32, 64])
def test_gptq_beats_onnx_runtimes(size):
    width = 192
    weight, rows = weight_of(width, 24), rows_of(2000, width)
    statistics, fresh, form = statistics_of(rows[:600]), rows[600:], WeightFormat(4, size)
    found = round_by_gptq(weight, fit_grid(weight, form), statistics).dequantize()
    rounded = weight_only.gptq(
        weight.astype(np.float64),
        statistics.hessian.astype(np.float64),
        group_size=size,
        scheme="sym",
    )
    bound = product_error(fresh, weight, rounded)
    assert product_error(fresh, weight, found) < 0.5 * bound
