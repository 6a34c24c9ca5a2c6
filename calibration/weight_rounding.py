"""Put a weight [K, N] on its grid: to the nearest, with clipped ranges, or by GPTQ.

Clips: for each block, the share of its range that the grid covers is the one with the smallest
``sum over k of E[x_k^2] (w - q)^2``, the diagonal of the product's error.

GPTQ (arXiv 2210.17323) rounds row after row and moves each row's error to those not rounded
yet: with ``U`` the upper Cholesky factor of the inverse of ``H + d I``,

    e = (w_k - q_k) / U_kk,      w_j -= U_kj e   for j > k,

in the order of falling ``H_kk`` (act-order). The grid of each block is fixed before, from the
original weight, so that the rows of a block may be rounded in any order and the result is
still a plain block-wise weight. Rows are worked on 128 at a time, as in the paper.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .activation_statistics import RowStatistics
from .quantized_weight import QuantizedWeight
from .weight_grids import FloatArray, WeightFormat, WeightGrid, fit_grid

CLIPS = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Shares of a block's range that are tried."""

DAMPING = 0.01
"""Added to H's diagonal, relative to its mean (the paper's value)."""

Float64Array = npt.NDArray[np.float64]

_ROWS = 128
_COLUMNS = 256  # that are worked on at a time, so that they stay in the cache


def round_to_nearest(weight: FloatArray, form: WeightFormat) -> QuantizedWeight:
    """The whole range of each block, each value to the nearest."""
    grid = fit_grid(weight, form)
    return QuantizedWeight(grid.quantize(weight), grid)


def clip_grid(
    weight: FloatArray, form: WeightFormat, square: FloatArray | None = None
) -> WeightGrid:
    """The grid with the best clip of each block.

    Args:
        square: float32 [K], mean of x^2; all the same if None.
    """
    importance = np.ones(len(weight), np.float32) if square is None else square
    starts = range(0, weight.shape[1], _COLUMNS)
    parts = [np.ascontiguousarray(weight[:, start : start + _COLUMNS]) for start in starts]
    clips = [_best_clips(part, form, importance[:, None]) for part in parts]
    return fit_grid(weight, form, np.concatenate(clips, axis=1))


def _best_clips(weight: FloatArray, form: WeightFormat, importance: FloatArray) -> FloatArray:
    """Of each block, float32 [G, N]."""
    best_clip = np.ones((form.groups(len(weight)), weight.shape[1]), np.float32)
    best_error = np.full(best_clip.shape, np.inf, np.float32)
    firsts = np.arange(0, len(weight), form.group_size or len(weight))
    for clip in CLIPS:
        off = fit_grid(weight, form, clip).round(weight)
        off -= weight
        off *= off
        off *= importance
        error = np.add.reduceat(off, firsts, axis=0)
        better = error < best_error
        best_clip[better] = clip
        best_error[better] = error[better]
    return best_clip


def round_clipped(
    weight: FloatArray, form: WeightFormat, square: FloatArray | None = None
) -> QuantizedWeight:
    """Each value to the nearest on the grid of :func:`clip_grid`."""
    grid = clip_grid(weight, form, square)
    return QuantizedWeight(grid.quantize(weight), grid)


def round_by_gptq(
    weight: FloatArray, grid: WeightGrid, rows: RowStatistics, act_order: bool = True
) -> QuantizedWeight:
    """GPTQ on a given grid.

    Args:
        weight: float32 [K, N].
        rows: with their ``hessian``.
        act_order: round rows of large activations first.
    """
    assert rows.hessian is not None
    hessian = rows.hessian.astype(np.float64)
    diagonal = np.diagonal(hessian).copy()
    dead = diagonal <= 0
    hessian[dead, dead] = 1.0
    np.fill_diagonal(
        hessian, np.diagonal(hessian) + DAMPING * max(float(diagonal.mean()), 1e-12)
    )
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(weight))
    factor = _inverse_factor(hessian[np.ix_(order, order)])
    codes = np.empty(weight.shape, np.int8)
    remaining = weight[order].astype(np.float32)
    for start in range(0, len(order), _ROWS):
        stop = min(start + _ROWS, len(order))
        errors = np.empty((stop - start, weight.shape[1]), np.float32)
        part, inner = remaining[start:stop], factor[start:stop, start:stop]
        for index in range(stop - start):
            row = int(order[start + index])
            cell = grid.of_rows(row, row + 1)
            code = cell.quantize(part[index : index + 1])
            codes[row] = code[0]
            errors[index] = (part[index] - cell.dequantize(code)[0]) / inner[index, index]
            part[index + 1 :] -= np.outer(inner[index, index + 1 :], errors[index])
        remaining[stop:] -= factor[start:stop, stop:].T @ errors
    return QuantizedWeight(codes, grid)


def _inverse_factor(hessian: Float64Array) -> FloatArray:
    """Upper triangular U with ``U^T U = H^-1``."""
    lower = np.linalg.cholesky(np.linalg.inv(hessian))
    return np.ascontiguousarray(lower.T).astype(np.float32)
