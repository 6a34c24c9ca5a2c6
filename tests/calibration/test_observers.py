"""Observers against ONNX Runtime's calibrators, brute force, and what must always hold."""

import tracemalloc
from functools import partial

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import (
    CalibrationDataReader,
    HistogramCollector,
    MinMaxCalibrater,
)

from mvlm_export.calibration.observers import (
    OBSERVERS,
    ChannelMinMax,
    Entropy,
    MinMax,
    Mse,
    Percentile,
    make_observer,
    scale_of,
)
from mvlm_export.engines.errors import InputError

from .distributions import DISTRIBUTIONS, draw

PORTIONS = 3
"""Samples that each distribution is shown in."""

values_of = arrays(
    np.float32,
    array_shapes(max_dims=2, max_side=40),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def observe(observer, *samples):
    for sample in samples:
        observer.update(sample)
    return observer.amax()


def observe_all(method, *samples):
    return observe(make_observer(method, "x"), *samples)


class Portions(CalibrationDataReader):
    def __init__(self, values):
        self._left = iter(np.array_split(values, PORTIONS))

    def get_next(self):
        values = next(self._left, None)
        return None if values is None else {"x": values}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_min_max_is_onnx_runtimes(name, tmp_path):
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in "xy"]
    node = helper.make_node("Neg", ["x"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    calibrater = MinMaxCalibrater(
        tmp_path / "m.onnx", augmented_model_path=str(tmp_path / "a.onnx"), symmetric=True
    )
    calibrater.augment_graph()
    calibrater.create_inference_session()
    values = draw(name)
    calibrater.collect_data(Portions(values))
    _, expected = calibrater.compute_data()["x"].range_value
    assert observe_all("min-max", *np.array_split(values, PORTIONS)) == expected


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentiles_are_onnx_runtimes(name, percentile):
    """Theirs is the lower edge of the bin with the percentile, ours the upper one.

    They get the values in one portion: their histogram loses some when it grows.
    """
    values = draw(name)
    observer = Percentile("x", percentile)
    found = observe(observer, *np.array_split(values, PORTIONS))
    collector = HistogramCollector("percentile", True, 2048, 128, percentile, "same")
    collector.collect({"x": values})
    expected = float(collector.compute_collection_result()["x"][1])
    assert -1e-5 <= found - expected <= observer.histogram.width + 16 / 2048 + 1e-5


@pytest.mark.parametrize("percentile", [50, 99.99, 100])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentiles_are_those_of_the_sorted_values(name, percentile):
    magnitudes = np.sort(np.abs(draw(name)))
    observer = Percentile("x", percentile)
    found = observe(observer, magnitudes)
    exact = np.quantile(magnitudes, percentile / 100, method="inverted_cdf")
    assert exact <= found <= exact + observer.histogram.width


def squared_error(values, amax):
    scale = amax / 127
    return float(np.square(values - np.rint(values / scale).clip(-127, 127) * scale).sum())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_finds_the_least_error(name):
    values = draw(name).astype(np.float64)
    least = min(squared_error(values, 16 * 0.98**n) for n in range(200))
    found = observe_all("mse", *np.array_split(values, PORTIONS))
    assert squared_error(values, found) <= 1.01 * least


def test_methods_go_by_name():
    assert list(OBSERVERS) == ["min-max", "percentile", "entropy", "mse"]
    assert type(make_observer("mse", "x")) is Mse
    with pytest.raises(InputError, match="no calibration method 'max'; choose one of min-max"):
        make_observer("max", "x")


SMALL = {
    "min-max": partial(make_observer, "min-max", "x"),
    "percentile": partial(Percentile, "x", 99.0, 512),
    "entropy": partial(Entropy, "x", 512),
    "mse": partial(Mse, "x", 512),
}
"""Observers with few bins, which answer sooner."""


@settings(max_examples=50)
@given(st.lists(values_of, min_size=1, max_size=4), st.randoms())
def test_order_and_portions_do_not_matter(samples, random):
    """To the bit: growing a histogram merges bins exactly."""
    everything = np.concatenate([sample.reshape(-1) for sample in samples])
    shuffled = random.sample(samples, len(samples))
    for make in SMALL.values():
        whole = observe(make(), everything)
        assert observe(make(), *samples) == whole
        assert observe(make(), *shuffled) == whole


@settings(max_examples=50)
@given(values_of)
def test_ranges_lie_between_zero_and_the_largest_magnitude(values):
    largest = np.abs(values).max()
    for make in SMALL.values():
        amax = observe(make(), values)
        assert 0 <= amax <= largest
        assert (amax > 0) == (largest > 0)
        assert scale_of(amax) > 0
    assert observe_all("min-max", values) == largest


@settings(max_examples=50)
@given(values_of)
def test_signs_and_powers_of_two_do_not_matter(values):
    for make in SMALL.values():
        amax = observe(make(), values)
        assert observe(make(), -values) == amax
        assert observe(make(), np.abs(values)) == amax
        assert observe(make(), values.astype(np.float64) * 8) == 8 * amax


@pytest.mark.parametrize("method", OBSERVERS)
def test_zeros_have_a_range_and_a_scale(method):
    amax = observe_all(method, np.zeros((3, 4), np.float32), np.zeros(2, np.float32))
    assert amax == 0
    assert scale_of(amax) == np.float32(2.0**-14)


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize("value", [1e-45, 1e-30, 1.0, 1.5, 3e38])
def test_one_value_of_any_size(method, value):
    value = np.float32(value)
    assert observe_all(method, np.zeros(5, np.float32), -value.reshape(1)) == value


@pytest.mark.parametrize("method", OBSERVERS)
def test_halves_and_doubles(method):
    halves = draw("gaussian").astype(np.float16)
    expected = observe_all(method, halves.astype(np.float32))
    assert observe_all(method, halves) == expected
    assert observe_all(method, halves.astype(np.float64)) == expected


@pytest.mark.parametrize("make", [*OBSERVERS.values(), ChannelMinMax])
class TestMistakes:
    def test_nothing_seen(self, make):
        observer = make("layer 3")
        observer.update(np.zeros((0, 4), np.float32))
        with pytest.raises(InputError, match="No values of 'layer 3' have been seen"):
            observer.amax()

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_not_finite(self, make, bad, dtype):
        observer = make("layer 3")
        observer.update(np.ones((2, 2), dtype))
        with pytest.raises(InputError, match="1 of 4 values of 'layer 3' are NaN or infinite"):
            observer.update(np.array([[5, bad], [7, 8]], dtype))
        assert np.all(observer.amax() == 1)

    def test_beyond_float32(self, make):
        with pytest.raises(InputError, match="1 of 2 values"):
            make("x").update(np.array([1.0, 1e200]))

    def test_integers(self, make):
        with pytest.raises(InputError, match="'ids' holds int32, not floats"):
            make("ids").update(np.ones(3, np.int32))


def test_settings_that_cannot_be():
    for percentile in (0, -1, 100.5, float("nan")):
        with pytest.raises(InputError, match="The percentile is"):
            Percentile("x", percentile)
    for kind in (Entropy, Mse):
        with pytest.raises(InputError, match="512 bins or more"):
            kind("x", bins=256)
        with pytest.raises(InputError, match="power of two"):
            kind("x", bins=1000)


def test_memory_does_not_grow_with_the_values():
    values = np.random.default_rng(0).normal(size=2**22).astype(np.float32)
    observer = Percentile("x")
    observer.update(values[:10])
    tracemalloc.start()
    for factor in (1, 2, 4):
        observer.update(values * np.float32(factor))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**19
    assert peak < values.nbytes + 2**25


rows = arrays(np.float32, st.tuples(st.integers(1, 5), st.just(3)))


@settings(max_examples=50)
@given(st.lists(rows, min_size=1, max_size=4))
def test_channels(samples):
    finite = [np.nan_to_num(sample, posinf=1, neginf=-1) for sample in samples]
    expected = np.abs(np.concatenate(finite)).max(axis=0)
    amax = observe(ChannelMinMax("x"), *finite)
    assert np.array_equal(amax, expected)
    assert amax.dtype == np.float32
    assert scale_of(amax).shape == (3,)
    assert amax.max() == observe(MinMax("x"), *finite)


def test_channels_of_deep_tensors_and_of_changed_ones():
    observer = ChannelMinMax("hidden")
    values = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    observer.update(values)
    with pytest.raises(InputError, match="'hidden' had 5 channels and now has 4"):
        observer.update(np.ones((7, 4), np.float32))
    assert np.array_equal(observer.amax(), np.abs(values).max(axis=(0, 1)))


@given(st.floats(0, 1e6), st.sampled_from([4, 8]))
def test_scales_reach_to_amax(amax, bits):
    """Within float16's rounding, where the scale is a normal float16 number."""
    scale = scale_of(amax, bits)
    top = 2 ** (bits - 1) - 1
    assert scale == np.float16(scale)
    assert scale >= 2.0**-14
    if 2.0**-14 <= amax / top <= 65504:
        assert scale * top == pytest.approx(amax, rel=2.0**-11)


@pytest.mark.parametrize("amax", [-1.0, np.nan, np.inf, np.array([1.0, -1.0])])
def test_scales_of_nonsense(amax):
    with pytest.raises(InputError, match="negative or not finite"):
        scale_of(amax)
