"""What range of a tensor's values the int8 grid should cover, learnt as they stream by.

An observer is shown the tensor's values on each sample, and then gives ``amax``: the magnitude
that becomes code 127. It keeps a maximum or a histogram, never the values. Order and portions
do not matter: the result is the same to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from mvlm_export.engines.errors import InputError

from .clipping import entropy_clip, mse_clip, percentile_clip
from .magnitude_histogram import MagnitudeHistogram, Values, finite_floats
from .weight_grids import Bits, FloatArray, safe_scales

Amax = TypeVar("Amax", float, FloatArray)

FINE_BINS = 2**14
"""Of percentiles and of squared errors: 128 KiB a tensor, 1/8192 of the range or finer."""

ENTROPY_BINS = 2**12
"""2049 to 4096 of them in use, as TensorRT uses 2048; clips start at 1/32 to 1/16 of amax."""


class Observer(ABC, Generic[Amax]):
    """Watches one tensor.

    Args:
        tensor: its name, for messages.
    """

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self._is_empty = True

    def update(self, values: Values) -> None:
        """Take in the values of one more sample, float16, float32 or float64 of any shape.

        Raises:
            InputError: they hold NaN or infinity, or are not floats. Nothing is taken in.
        """
        if values.size:
            self._add(finite_floats(values, self.tensor))
            self._is_empty = False

    def amax(self) -> Amax:
        """The magnitude to clip at; 0 where all values are zero.

        Raises:
            InputError: no values have been seen.
        """
        if self._is_empty:
            raise InputError(
                f"No values of {self.tensor!r} have been seen, so it has no range. Run the "
                "graph on at least one sample first."
            )
        return self._amax()

    @abstractmethod
    def _add(self, values: FloatArray) -> None: ...

    @abstractmethod
    def _amax(self) -> Amax: ...


class MinMax(Observer[float]):
    """The largest magnitude: nothing is clipped."""

    def __init__(self, tensor: str) -> None:
        super().__init__(tensor)
        self._largest = 0.0

    def _add(self, values: FloatArray) -> None:
        self._largest = max(self._largest, float(values.max()), -float(values.min()))

    def _amax(self) -> float:
        return self._largest


class ChannelMinMax(Observer[FloatArray]):
    """The largest magnitude of each channel: float32 [C] of values [..., C]."""

    def __init__(self, tensor: str) -> None:
        super().__init__(tensor)
        self._largest: FloatArray = np.zeros(0, np.float32)

    def _add(self, values: FloatArray) -> None:
        rows = values.reshape(-1, values.shape[-1] if values.ndim else 1)
        found = np.maximum(rows.max(axis=0), -rows.min(axis=0))
        if self._largest.size not in (0, found.size):
            raise InputError(
                f"{self.tensor!r} had {self._largest.size} channels and now has {found.size}. "
                "Show one observer one tensor."
            )
        self._largest = np.maximum(self._largest, found) if self._largest.size else found

    def _amax(self) -> FloatArray:
        return np.abs(self._largest)


class HistogramObserver(Observer[float]):
    """Chooses from a histogram of magnitudes.

    Args:
        bins: a power of two.
    """

    def __init__(self, tensor: str, bins: int) -> None:
        super().__init__(tensor)
        self.histogram = MagnitudeHistogram(bins)

    def _add(self, values: FloatArray) -> None:
        self.histogram.add(values)


class Percentile(HistogramObserver):
    """Clips all but a share of the values.

    Args:
        percentile: above 0, up to 100: values that are kept, in per cent.
    """

    def __init__(self, tensor: str, percentile: float = 99.99, bins: int = FINE_BINS) -> None:
        if not 0 < percentile <= 100:
            raise InputError(
                f"The percentile is {percentile}, but it is the share of values that are "
                "kept: give a number above 0, up to 100, such as 99.99."
            )
        super().__init__(tensor, bins)
        self._percentile = percentile

    def _amax(self) -> float:
        return percentile_clip(self.histogram, self._percentile)


class Entropy(HistogramObserver):
    """Loses the least information, as TensorRT's entropy calibration measures it.

    Args:
        bins: 512 at least.
    """

    def __init__(self, tensor: str, bins: int = ENTROPY_BINS) -> None:
        if bins < 512:
            raise InputError(f"Entropy needs 512 bins or more, not {bins}.")
        super().__init__(tensor, bins)

    def _amax(self) -> float:
        return entropy_clip(self.histogram)


class Mse(HistogramObserver):
    """Makes the sum of squared rounding and clipping errors least.

    Args:
        bins: 512 at least.
    """

    def __init__(self, tensor: str, bins: int = FINE_BINS) -> None:
        if bins < 512:
            raise InputError(f"Squared errors need 512 bins or more, not {bins}.")
        super().__init__(tensor, bins)

    def _amax(self) -> float:
        return mse_clip(self.histogram)


OBSERVERS: dict[str, Callable[[str], Observer[float]]] = {
    "min-max": MinMax,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": Mse,
}
"""Per-tensor observers by name."""


def make_observer(method: str, tensor: str) -> Observer[float]:
    """An observer of ``OBSERVERS`` for one tensor.

    Raises:
        InputError: there is none of that name.
    """
    if method not in OBSERVERS:
        raise InputError(
            f"There is no calibration method {method!r}; choose one of {', '.join(OBSERVERS)}."
        )
    return OBSERVERS[method](tensor)


def scale_of(amax: float | FloatArray, bits: Bits = 8) -> FloatArray:
    """Scale of a symmetric grid that reaches to ``amax``: ``amax / (2 ** (bits - 1) - 1)``.

    Returns:
        float32 of the shape of ``amax``, positive float16 numbers (also where it is 0).

    Raises:
        InputError: ``amax`` is negative, NaN or infinite.
    """
    values = np.asarray(amax, np.float64)
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise InputError(
            f"The range {amax} is negative or not finite. Observe finite activations first."
        )
    return np.asarray(safe_scales(values / (2 ** (bits - 1) - 1)), np.float32)
