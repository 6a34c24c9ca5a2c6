"""Grids of weights: how far a weight may lie from its rounded self, and what scales may be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import quantize_data

from mvlm_export.calibration.weight_grids import (
    GROUP_SIZES,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    WeightFormat,
    WeightGrid,
    fit_grid,
    in_blocks,
    safe_scales,
)
from mvlm_export.engines.errors import InputError

INT8 = WeightFormat(8)
FORMS = [
    INT8,
    *(WeightFormat(4, size, symmetric) for size in GROUP_SIZES for symmetric in (True, False)),
]
ROWS = [1, 31, 128, 576]

matrices = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-1e4, 1e4, width=32),
)
forms = st.sampled_from(FORMS)


def weight_of(rows, columns=5, seed=0, scale=0.05):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((rows, columns)) * scale).astype(np.float32)


def steps_of(grid: WeightGrid, rows):
    """The scale of each value."""
    return in_rows(grid.scales, grid.form, rows)


def in_rows(table, form, rows):
    size = form.group_size or rows
    return np.repeat(table, size, axis=0)[:rows]


def assert_half_a_step(weight, form):
    grid = fit_grid(weight, form)
    codes = grid.quantize(weight)
    low, high = form.limits
    assert codes.dtype == np.int8
    assert codes.min() >= low
    assert codes.max() <= high
    error = np.abs(weight.astype(np.float64) - grid.dequantize(codes))
    # 1e-6 of the weight, and of a block's offset, is float32's rounding.
    slack = 1e-6 * (np.abs(weight) + np.abs(weight).max())
    assert (error <= steps_of(grid, len(weight)) / 2 + slack).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_a_weight_lies_within_half_a_step_of_its_rounded_self(form, rows):
    """576 rows are four and a half blocks of 128."""
    weight = weight_of(rows)
    assert_half_a_step(weight, form)
    assert fit_grid(weight, form).scales.shape == (form.groups(rows), 5)


@given(matrices, forms)
def test_half_a_step_whatever_the_weight(weight, form):
    assert_half_a_step(weight, form)


@given(matrices, forms)
def test_a_rounded_weight_is_on_its_grid(weight, form):
    grid = fit_grid(weight, form)
    codes = grid.quantize(weight)
    np.testing.assert_array_equal(grid.quantize(grid.dequantize(codes)), codes)
    np.testing.assert_array_equal(grid.round(weight), grid.dequantize(codes))


@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
    forms,
)
def test_scales_and_offsets_are_float16_numbers(weight, form):
    """Any finite weight, 1e38 too: positive normal scales, finite offsets and values."""
    grid = fit_grid(weight, form)
    assert grid.scales.min() >= SMALLEST_SCALE
    assert grid.scales.max() <= LARGEST_SCALE
    for table in (grid.scales,) if grid.offsets is None else (grid.scales, grid.offsets):
        assert table.dtype == np.float32
        np.testing.assert_array_equal(table, table.astype(np.float16).astype(np.float32))
    assert np.isfinite(grid.round(weight)).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zero_columns_and_blocks(form):
    weight = weight_of(160)
    weight[:, 2] = 0
    weight[:128, 3] = 0
    grid = fit_grid(weight, form)
    rounded = grid.round(weight)
    assert (grid.scales > 0).all()
    if form.symmetric:
        assert not rounded[:, 2].any()
        assert not rounded[:128, 3].any()
    else:
        assert np.abs(rounded[:, 2]).max() <= SMALLEST_SCALE / 2
    assert_half_a_step(weight, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-4, 1.0, 3e4])
def test_tiny_and_huge_weights(form, size):
    weight = weight_of(96) * np.float32(size)
    assert_half_a_step(weight, form)
    if size >= 1e-2:
        off = np.linalg.norm(fit_grid(weight, form).round(weight) - weight)
        assert off < 0.12 * np.linalg.norm(weight)


def test_codes_are_those_of_the_rounded_scale():
    """Not of the exact one: 0.5 % of these int8 codes would differ."""
    weight = weight_of(512, columns=64)
    exact = np.abs(weight).max(axis=0) / 127
    grid = fit_grid(weight, INT8)
    np.testing.assert_array_equal(grid.scales[0], exact.astype(np.float16))
    codes = grid.quantize(weight)
    np.testing.assert_array_equal(codes, np.rint(weight / grid.scales[0]))
    assert 0.002 < (codes != np.rint(weight / exact)).mean() < 0.01


def test_int8_codes_are_onnx_runtimes():
    """Column by column, but where its float32 scale rounds another way than float16."""
    weight = weight_of(256, columns=16)
    grid = fit_grid(weight, INT8)
    codes = grid.quantize(weight)
    for column in range(16):
        zero, scale, theirs = quantize_data(
            weight[:, column], TensorProto.INT8, symmetric=True
        )
        assert zero == 0
        np.testing.assert_allclose(grid.scales[0, column], scale, rtol=2**-11)
        off = codes[:, column].astype(int) - np.asarray(theirs).astype(int)
        assert np.abs(off).max() <= 1
        assert (off != 0).mean() < 0.02


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("shift", [0.1, 1.0, 40.0, 60_000.0])
def test_offsets_serve_shifted_weights(size, shift):
    """Beside zero, half of a symmetric grid or more is spent on nothing."""
    weight = weight_of(256, scale=0.03) + np.float32(shift)
    errors = [
        np.linalg.norm(
            fit_grid(weight, WeightFormat(4, size, symmetric)).round(weight) - weight
        )
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_a_clipped_asymmetric_grid_shrinks_about_its_middle(shift):
    weight = weight_of(64, columns=3, scale=0.1) + np.float32(shift)
    form = WeightFormat(4, 64, symmetric=False)
    grid = fit_grid(weight, form, 0.8)
    reach = np.array([grid.dequantize(np.full((64, 3), code, np.int8))[0] for code in (-8, 7)])
    middle = (weight.max(axis=0) + weight.min(axis=0)) / 2
    half = (weight.max(axis=0) - weight.min(axis=0)) / 2
    np.testing.assert_allclose(reach[0], middle - 0.8 * half, atol=0.02)
    np.testing.assert_allclose(reach[1], middle + 0.8 * half, atol=0.02)


def test_a_clip_for_each_block():
    weight, form = weight_of(100, columns=3), WeightFormat(4, 32)
    clip = np.linspace(0.5, 1, 12, dtype=np.float32).reshape(4, 3)
    whole, part = fit_grid(weight, form), fit_grid(weight, form, clip)
    np.testing.assert_allclose(part.scales, whole.scales * clip, rtol=2**-10)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_row_of_a_grid(form):
    weight = weight_of(150)
    grid = fit_grid(weight, form)
    whole = grid.round(weight)
    for row in (0, 31, 32, 127, 128, 149):
        one = grid.of_rows(row, row + 1)
        np.testing.assert_array_equal(one.round(weight[row : row + 1])[0], whole[row])


def test_blocks_end_with_the_last_row():
    weight = weight_of(40)
    blocks = in_blocks(weight, WeightFormat(4, 32))
    assert blocks.shape == (2, 32, 5)
    np.testing.assert_array_equal(blocks.reshape(-1, 5)[:40], weight)
    assert (blocks[1, 8:] == weight[-1]).all()


@given(st.floats(allow_nan=False, width=32))
def test_safe_scales(scale):
    (safe,) = safe_scales(np.array([scale], np.float32))
    assert SMALLEST_SCALE <= safe <= LARGEST_SCALE
    if SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        assert abs(safe - scale) <= scale * 2**-11


@pytest.mark.parametrize(
    ("form", "size", "text"),
    [
        (INT8, 576 * 64 + 2 * 64, "int8"),
        (WeightFormat(4, 128), 576 * 32 + 2 * 5 * 64, "int4 g128"),
        (WeightFormat(4, 32, False), 576 * 32 + 2 * 2 * 18 * 64, "int4 g32 asym"),
    ],
    ids=str,
)
def test_bytes_and_names(form, size, text):
    assert form.stored_bytes(576, 64) == size
    assert str(form) == text


@pytest.mark.parametrize(
    ("rows", "size", "fitting"),
    [
        (256, 128, 128),
        (576, 128, 64),
        (96, 128, 32),
        (96, 64, 32),
        (96, 32, 32),
        (100, 64, 64),
    ],
)
def test_groups_that_divide_the_rows(rows, size, fitting):
    """None divides 100 rows: the format stays as it is."""
    for symmetric in (True, False):
        form = WeightFormat(4, size, symmetric).for_rows(rows)
        assert form == WeightFormat(4, fitting, symmetric)
    assert INT8.for_rows(rows) == INT8


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"bits": 3}, "4 or 8 bits, not 3"),
        ({"bits": 8, "group_size": 32}, "8-bit weights have one scale a column"),
        ({"bits": 8, "symmetric": False}, "no offset"),
        ({"bits": 4}, "group_size of 32, 64, 128, not None"),
        ({"bits": 4, "group_size": 16}, "not 16: with one scale a column TensorRT would"),
    ],
)
def test_formats_that_nothing_runs_well_are_refused(fields, complaint):
    with pytest.raises(InputError, match=complaint):
        WeightFormat(**fields)
