"""Figures that say how far two tensors, or the answers of two models, are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Distance:
    """Worst figures over a set of tensors.

    Attributes:
        max_abs: largest absolute difference of two elements.
        relative: largest ``||a - b|| / ||b||`` of a tensor.
        cosine: smallest cosine of a tensor with its reference.
    """

    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0

    def worst(self, other: Distance) -> Distance:
        """The worse of each figure; one that is not a number stays so."""
        return Distance(
            float(np.maximum(self.max_abs, other.max_abs)),
            float(np.maximum(self.relative, other.relative)),
            float(np.minimum(self.cosine, other.cosine)),
        )


INFINITELY_FAR = Distance(float("inf"), float("inf"), -1.0)
"""Of tensors that hold NaN or infinity, on either side."""


def distance(found: Array, reference: Array) -> Distance:
    """Compare two tensors of one shape as flat float64 vectors.

    NaN or infinity on either side is infinitely far, also where both have it.

    Raises:
        ValueError: the shapes differ.
    """
    if found.shape != reference.shape:
        raise ValueError(f"shapes differ: {found.shape} and {reference.shape}")
    a, b = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return INFINITELY_FAR
    if a.size == 0:
        return Distance()
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    gap = a - b
    relative = float(np.linalg.norm(gap)) / norm_b if norm_b else float(np.linalg.norm(gap))
    cosine = float(a @ b) / (norm_a * norm_b) if norm_a and norm_b else float(norm_a == norm_b)
    return Distance(float(np.abs(gap).max()), relative, min(1.0, cosine))


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    log_probabilities: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_probabilities


def _finite_rows(*sides: Array) -> npt.NDArray[np.bool_]:
    """Which rows are finite on every side: [rows, V] each -> [rows]."""
    finite: npt.NDArray[np.bool_] = np.logical_and.reduce(
        [np.isfinite(side).all(axis=-1) for side in sides]
    )
    return finite


def kl_divergence(reference: Array, found: Array) -> Array:
    """KL(reference || found) in nats of next-token distributions: [rows, V] each -> [rows].

    A row that is not finite on either side is infinitely far.
    """
    finite = _finite_rows(reference, found)
    p, q = log_softmax(reference[finite]), log_softmax(found[finite])
    divergence = np.full(len(reference), np.inf)
    divergence[finite] = (np.exp(p) * (p - q)).sum(axis=-1)
    return divergence


def negative_log_likelihood(logits: Array, ids: Sequence[int]) -> Array:
    """Nats that each token costs: logits [rows, V] and the ids they should give -> [rows].

    A row that is not finite costs infinitely much.
    """
    finite = _finite_rows(logits)
    chosen = np.asarray(ids)[finite]
    cost = np.full(len(logits), np.inf)
    cost[finite] = -log_softmax(logits[finite])[np.arange(len(chosen)), chosen]
    return cost


def binomial_tail(count: int, hits: int, chance: float) -> float:
    """P(X >= hits) of ``count`` tries that each hit with ``chance``, 0 < chance < 1."""
    below = 0.0
    for k in range(max(hits, 0)):
        choices = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        below += math.exp(choices + k * math.log(chance) + (count - k) * math.log1p(-chance))
    return max(0.0, 1.0 - below)


def top1_agreement(reference: Array, found: Array, tie: float) -> float:
    """Share of rows [rows, V] whose best token agrees, undecided rows left out.

    A row counts as agreeing as well when the reference holds the token that was found within
    ``tie`` of its own best; a row that is not finite on either side never agrees.
    """
    rows = np.arange(len(reference))
    with np.errstate(invalid="ignore"):  # rows that hold infinity are sorted out below
        gap = reference.max(axis=-1) - reference[rows, found.argmax(axis=-1)]
    return float(((gap < tie) & _finite_rows(reference, found)).mean())


def first_divergence(found: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first differing token, None when both are equal.

    Where one is the beginning of the other, its length.
    """
    for index, (a, b) in enumerate(zip(found, reference, strict=False)):
        if a != b:
            return index
    return None if len(found) == len(reference) else min(len(found), len(reference))
