"""Does a weight survive float16? Judged by its values, before the graph is changed."""

from __future__ import annotations

import numpy as np

from mvlm_export.engines.errors import PassError

from ..deferred import Array

LARGEST = 65504.0
"""Of float16."""

COSINE = 0.9999
"""A weight must keep its direction at least so well."""

RELATIVE = 1e-3
"""A scalar or a scale must be met so closely: twice float16's own rounding."""

_CHUNK = 1 << 20


def float16_problem(name: str, values: Array, exact: bool) -> str | None:
    """Why a constant must stay float32; None if float16 holds it.

    Args:
        name: of the constant, for messages.
        values: float32; read in pieces, so that little memory is needed beside it.
        exact: hold every value to ``RELATIVE``, not just the whole to ``COSINE``, as a scale
            or a divisor must be; always so for a single number.

    Raises:
        PassError: it holds NaN.
    """
    flat = values.ravel(order="K")
    if flat.size == 0:
        return None
    if flat.size == 1 or exact:
        return _inexact(name, flat)
    largest, sums = 0.0, np.zeros(3)
    for start in range(0, flat.size, _CHUNK):
        piece = flat[start : start + _CHUNK]
        largest = max(largest, _magnitude(name, piece))
        if largest > LARGEST:
            return f"the weight {name!r} holds {largest:.6g}, beyond float16's {LARGEST:.0f}"
        narrow = piece.astype(np.float16).astype(np.float32)
        sums += [np.dot(piece, narrow), np.dot(piece, piece), np.dot(narrow, narrow)]
    if largest == 0:
        return None
    product, before, after = (float(value) for value in sums)
    if after == 0:
        return f"the weight {name!r} would be all zeros in float16 (largest: {largest:.3g})"
    cosine = product / (before * after) ** 0.5
    if cosine < COSINE:
        return (
            f"the weight {name!r} would lose its small values in float16: its cosine with "
            f"what it was is {cosine:.5f}, below {COSINE}"
        )
    return None


def _magnitude(name: str, piece: Array) -> float:
    largest = float(max(piece.max(), -piece.min()))
    if np.isnan(largest):
        raise PassError(
            f"the weight {name!r} holds values that are no numbers (NaN), so no dtype helps. "
            "Check the checkpoint it was read from"
        )
    return largest


def _inexact(name: str, flat: Array) -> str | None:
    if _magnitude(name, flat) > LARGEST:
        worst = flat[np.abs(flat).argmax()]
        return f"the constant {name!r} holds {worst:.6g}, which is no float16 number"
    narrow = flat.astype(np.float16).astype(np.float32)
    off = np.abs(narrow - flat) > RELATIVE * np.abs(flat)
    if off.any():
        worst = flat[off.argmax()]
        return f"the constant {name!r} holds {worst:.6g}, which float16 does not hold closely"
    return None
