"""What is kept of the rows that a linear layer reads: a few figures, not the rows.

H = sum over rows of x x^T          [K, K], what GPTQ and the search for clips need
largest |x|, mean |x|               [K], what SmoothQuant and AWQ need
a sample of the rows                [R, K], on which a choice is tried out
rows with the largest values        [E, K], few tokens that reach far above all others
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mvlm_export.engines.errors import InputError

from .weight_grids import FloatArray

SAMPLE_ROWS = 512

EXTREME_ROWS = 64
"""A sample can miss the tokens whose values set the range of the whole tensor."""


COLUMNS = 1024
"""A choice for all columns of a weight is tried on so many, evenly spread."""


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Of the rows x [M, K] before one layer.

    Attributes:
        count: M.
        hessian: float32 [K, K], sum of x x^T over rows, divided by M; None if not asked for.
        square: float32 [K], mean of x^2.
        mean: float32 [K], mean of |x|.
        largest: float32 [K], largest |x|.
        sample: float32 [R, K], rows evenly spread.
        extremes: float32 [E, K], those of the other rows with the largest |x|.
    """

    count: int
    hessian: FloatArray | None
    square: FloatArray
    mean: FloatArray
    largest: FloatArray
    sample: FloatArray
    extremes: FloatArray

    def weighted_sample(self) -> tuple[FloatArray, FloatArray]:
        """Sample and extremes [R + E, K], and how many rows each stands for [R + E, 1]."""
        rows = np.concatenate([self.sample, self.extremes])
        weights = np.ones((len(rows), 1), np.float32)
        weights[: len(self.sample)] = max(self.count - len(self.extremes), 0) / len(
            self.sample
        )
        return rows, weights


def row_statistics(
    name: str, rows: Sequence[FloatArray], hessian: bool = False
) -> RowStatistics:
    """Figures of rows [M_i, K] that come in several pieces.

    Args:
        name: of the tensor, for messages.

    Raises:
        InputError: there is no row, or one holds NaN or infinity.
    """
    count = sum(len(piece) for piece in rows)
    if not count:
        raise InputError(f"No rows reach {name!r}. Give samples with a picture and a prompt.")
    for piece in rows:
        if not np.isfinite(piece).all():
            raise InputError(
                f"Calibration met values in {name!r} that are not finite (NaN or infinity). "
                "Check the checkpoint with `mvlm-export --recipe fp32`, and the pictures."
            )
    width = rows[0].shape[1]
    total = np.zeros((width, width), np.float32) if hessian else None
    square, mean = np.zeros(width), np.zeros(width)
    largest = np.zeros(width, np.float32)
    for piece in rows:
        if total is not None:
            total += piece.T @ piece
        magnitudes = np.abs(piece)
        square += np.einsum("mk,mk->k", piece, piece, dtype=np.float64)
        mean += magnitudes.sum(axis=0, dtype=np.float64)
        largest = np.maximum(largest, magnitudes.max(axis=0, initial=0))
    if total is not None:
        total /= count
    return RowStatistics(
        count,
        total,
        (square / count).astype(np.float32),
        (mean / count).astype(np.float32),
        largest,
        *_sample(rows, count),
    )


def _sample(rows: Sequence[FloatArray], count: int) -> tuple[FloatArray, FloatArray]:
    """Rows evenly spread, and those of the largest magnitudes among the others."""
    chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE_ROWS)).astype(np.int64))
    starts = np.cumsum([0, *(len(piece) for piece in rows)])
    sample, others = [], []
    for piece, start in zip(rows, starts[:-1], strict=True):
        here = chosen[(chosen >= start) & (chosen < start + len(piece))] - start
        sample.append(piece[here])
        others.append(_widest(np.delete(piece, here, axis=0)))
    return np.concatenate(sample), _widest(np.concatenate(others))


def _widest(rows: FloatArray) -> FloatArray:
    """The rows [E, K] with the largest magnitudes, in their order."""
    if len(rows) <= EXTREME_ROWS:
        return rows
    reach = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    return rows[np.sort(np.argpartition(reach, -EXTREME_ROWS)[-EXTREME_ROWS:])]


def some_columns(weight: FloatArray) -> FloatArray:
    """A weight [K, N], or ``COLUMNS`` of its columns that stand for all."""
    count = weight.shape[1]
    if count <= COLUMNS:
        return weight
    chosen = np.linspace(0, count - 1, COLUMNS).astype(np.int64)
    return np.ascontiguousarray(weight[:, chosen])
