"""Activations of several kinds, as tensors see them in transformers."""

import numpy as np

SIZE = 60_013
"""No round percentile of it is a whole number, where rounding would choose the value."""


def _gaussian(rng):
    return rng.normal(size=SIZE)


def _heavy_tailed(rng):
    return rng.standard_t(3, size=SIZE)


def _sparse(rng):
    return rng.normal(size=SIZE) * (rng.random(SIZE) < 0.05)


def _one_outlier(rng):
    return np.append(rng.normal(size=SIZE), 60.0)


def _relu_like(rng):
    return np.maximum(rng.normal(size=SIZE), 0)


def _gelu_like(rng):
    values = rng.normal(size=SIZE) * 2
    return values / (1 + np.exp(-1.702 * values))


DISTRIBUTIONS = {
    "gaussian": _gaussian,
    "heavy-tailed": _heavy_tailed,
    "sparse": _sparse,
    "one-outlier": _one_outlier,
    "relu-like": _relu_like,
    "gelu-like": _gelu_like,
}


def draw(name, seed=0):
    """float32 values whose largest magnitude lies just below 16, a power of two.

    There all bins of an observer's histogram are in use.
    """
    values = DISTRIBUTIONS[name](np.random.default_rng(seed))
    return (values * (16 * (1 - 1e-6) / np.abs(values).max())).astype(np.float32)
