"""Scores of a decoder: by hand, and on a graph of ours against PyTorch."""

import numpy as np
import pytest
import torch
from decoder_scores import perplexity, score, score_logits, window_logits

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.targets import get_target
from mvlm_export.exporter.graphs import write_graph
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.pipeline import ModelFacts, PipelineOptions, build_pipeline

WINDOWS = np.random.default_rng(0).integers(0, 320, (2, 24)).astype(np.int32)


def test_even_logits_are_as_good_as_guessing():
    even = [np.ones((24, 320), np.float32)] * 2
    found = score_logits(even, WINDOWS, even)
    assert found.perplexity == pytest.approx(320)
    assert found.losses == pytest.approx([np.log(320)] * 2)
    assert found.distance.divergence == 0
    assert found.distance.agreement == 1
    assert found.distance.largest == 0


def test_divergence_is_kullback_and_leiblers():
    ids = np.array([[0, 1]], np.int32)
    theirs = np.log(np.array([[0.4, 0.6], [0.25, 0.75]], np.float32))
    ours = np.log(np.array([[0.25, 0.75], [0.75, 0.25]], np.float32))
    found = score_logits([ours], ids, [theirs])
    first = 0.4 * np.log(0.4 / 0.25) + 0.6 * np.log(0.6 / 0.75)
    second = 0.25 * np.log(0.25 / 0.75) + 0.75 * np.log(0.75 / 0.25)
    assert found.distance.divergence == pytest.approx((first + second) / 2, rel=1e-5)
    assert found.distance.agreement == pytest.approx(0.5)
    assert found.distance.largest == pytest.approx(np.log(3), rel=1e-6)
    assert found.perplexity == pytest.approx(1 / 0.75)


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    module, graph = tiny("decoder")
    return module, write_graph(graph, tmp_path_factory.mktemp("decoder"))


def test_a_graph_scores_as_its_module(decoder):
    module, path = decoder
    past = [torch.zeros(0, 2, 16)] * 4
    wanted = [
        module(torch.from_numpy(ids), torch.zeros(1, 64), past)[0].numpy() for ids in WINDOWS
    ]
    found = score(path, WINDOWS, reference=path)
    assert found.perplexity == pytest.approx(
        score_logits(wanted, WINDOWS).perplexity, rel=1e-5
    )
    assert found.distance.divergence == 0
    assert perplexity(path, WINDOWS) == found.perplexity


def test_a_graph_of_the_last_row_is_refused(tiny, tmp_path):
    _, graph = tiny("decoder")
    facts = ModelFacts(0, False, (0.5,) * 3, (0.5,) * 3, False, False, 0, 2, 16, 256)
    steps = build_pipeline("decoder", facts, get_target("orin"), PipelineOptions("float32"))
    PassManager(steps).run(graph)
    path = write_graph(graph, tmp_path)
    with pytest.raises(InputError, match=r"1 rows of logits for 24 tokens.*keep-last-row"):
        next(window_logits(path, WINDOWS))


def test_a_fixed_cache_is_refused(tiny, tmp_path):
    _, graph = tiny("decoder")
    facts = ModelFacts(0, False, (0.5,) * 3, (0.5,) * 3, False, False, 0, 2, 16, 256)
    steps = build_pipeline("decoder", facts, get_target("cpu"), PipelineOptions("float32"))
    PassManager(steps).run(graph)
    with pytest.raises(InputError, match="append form of the cache"):
        next(window_logits(write_graph(graph, tmp_path), WINDOWS))
