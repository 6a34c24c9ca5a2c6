"""The entropy search against its plain form and ONNX Runtime's; histograms against numpy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import HistogramCollector, entropy
from onnxruntime.quantization.quant_utils import smooth_distribution

from mvlm_export.calibration import clipping
from mvlm_export.calibration.data import read_samples
from mvlm_export.calibration.feeds import append_feeds, decoder_cases, pixel_feeds
from mvlm_export.calibration.magnitude_histogram import PORTION, MagnitudeHistogram
from mvlm_export.calibration.observers import OBSERVERS, Entropy, make_observer
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.assemble import image_processor, model_spec
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import default_samples, nano_checkpoint

from .distributions import DISTRIBUTIONS, draw


def histogram_of(values, bins):
    histogram = MagnitudeHistogram(bins)
    histogram.add(values)
    return histogram


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60), st.data())
def test_histograms_are_numpys(values, data):
    array = np.array(values, np.float32)
    histogram = MagnitudeHistogram(64)
    cut = data.draw(st.integers(0, len(values)))
    for part in (array[:cut], array[cut:]):
        if part.size:
            histogram.add(part)
    largest = np.abs(array).max()
    assert histogram.largest == largest
    edges = np.arange(65) * (histogram.width or 1.0)
    assert np.array_equal(histogram.counts, np.histogram(np.abs(array), edges)[0])
    assert 32 < histogram.filled <= 64 or largest == 0


def test_histograms_count_every_portion():
    values = np.ones(2 * PORTION + 5, np.float32)
    values[-1] = 3
    histogram = histogram_of(values, 4)
    assert histogram.counts.tolist() == [0, 2 * PORTION + 4, 0, 1]


def test_growing_far_beyond_the_first_values():
    histogram = histogram_of(np.array([1e-45, 1e-44], np.float32), 8)
    histogram.add(np.array([3e38], np.float32))
    assert histogram.counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 1]


def plain_divergence(counts, kept):
    """Step by step as in the paper, smoothed as ONNX Runtime does."""
    levels = np.digitize(np.arange(kept), np.linspace(0, kept, 129)) - 1
    inside = counts[:kept]
    wanted = inside.copy()
    wanted[-1] += counts[kept:].sum()
    given = np.zeros(kept)
    for level in range(128):
        own = (levels == level) & (inside > 0)
        if own.any():
            given[own] = inside[own].sum() / own.sum()
    p, q = smooth_distribution(wanted), smooth_distribution(given)
    return np.inf if p is None or q is None else float(entropy(p, q))


DIVERGENCE_BOUND = 1e-6
"""Nats; ONNX Runtime's are float32 and smoothed everywhere. 4e-7 was found at worst."""


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_divergences_are_those_of_the_plain_form(name):
    histogram = histogram_of(draw(name), 512)
    counts = histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    expected = [plain_divergence(counts, kept) for kept in range(128, 513)]
    found = clipping._divergences(counts)
    assert np.abs(found - expected).max() < DIVERGENCE_BOUND


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_clip_is_the_last_of_least_divergence(name):
    observer = Entropy("x", bins=512)
    observer.update(draw(name))
    counts = observer.histogram.counts.astype(np.float64)
    counts[0] = counts[1]
    divergences = clipping._divergences(counts)
    place = round(observer.amax() / observer.histogram.width) - 128
    assert divergences[place] == divergences.min()
    assert np.all(divergences[place + 1 :] > divergences[place])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_entropy_rounds_about_as_well_as_onnx_runtimes(name, seed):
    """The clips differ by design, so the errors are compared: 1.20 times was found at worst.

    ONNX Runtime spans both signs with 255 levels and leaves the last ``(2 i + 1) mod 255``
    bins empty, so its search favours few clips; and it counts zeros, by which it loses 30
    times as much on sparse and ReLU-like values.
    """
    values = draw(name, seed)
    collector = HistogramCollector("entropy", True, 1025, 255, 99.99, "same")
    collector.collect({"x": values})
    theirs = float(collector.compute_collection_result()["x"][1])
    ours = Entropy("x", bins=512)
    ours.update(values)
    bound = 0.05 if name in ("sparse", "relu-like") else 1.25
    assert rounding_error(values, ours.amax()) <= bound * rounding_error(values, theirs)


def rounding_error(values, amax):
    """Root of the mean square."""
    wide = values.astype(np.float64)
    scale = amax / 127
    return np.sqrt(np.square(wide - np.rint(wide / scale).clip(-127, 127) * scale).mean())


@pytest.mark.parametrize("checkpoint", ["nano", "nano-outlier"])
def test_real_activations(checkpoint):
    """Inputs of the nano decoder's linear layers, sample by sample."""
    found = linear_inputs(nano_checkpoint().with_name(checkpoint))
    assert len(found) == 4 * 7 + 1
    for name, samples in found.items():
        values = np.concatenate([sample.reshape(-1) for sample in samples])
        errors, clips = {}, {}
        for method in OBSERVERS:
            observer = make_observer(method, name)
            for sample in samples:
                observer.update(sample)
            clips[method] = observer.amax()
            errors[method] = rounding_error(values, clips[method])
        assert clips["min-max"] == np.abs(values).max() == max(clips.values())
        assert min(clips.values()) > 0
        assert errors["mse"] <= 1.01 * min(errors.values())


def linear_inputs(folder):
    """Values of each linear layer's input, by layer, for each sample."""
    reference = ReferenceModel.open(folder)
    config = reference.config
    processor = image_processor(folder, config)
    model = model_spec("nano", config, processor, "v1")
    samples = read_samples(default_samples())
    cases = decoder_cases(model, LlamaTokenizer.from_folder(folder), samples)
    found = {}

    def keep(name):
        def hook(module, inputs):
            found.setdefault(name, []).append(inputs[0].numpy().copy())

        return hook

    for name, module in reference.decoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.inference_mode():
        for case, pixels in zip(cases, pixel_feeds(model, samples, "float32"), strict=True):
            features = reference.image_features(pixels["pixel_values"])
            feed = append_feeds(model, case.ids, reference.image_embeds(features)[0])
            ids, embeds, *pasts = (torch.from_numpy(value) for value in feed.values())
            reference.decoder(ids, embeds, pasts)
    return found
