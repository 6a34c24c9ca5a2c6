"""The filters against transformers' own and against references written out plainly."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.sampling import Sampler, SamplingParams, filtered_probabilities

RANDOM = np.random.default_rng(3)
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 2.5, "top_k": 1000},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
]


def by_transformers(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    steps = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        steps.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(hf.MinPLogitsWarper(params.min_p))
    scores = steps(
        torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None].double()
    )
    return torch.softmax(scores[0], -1).numpy()


def dense(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    ids, probabilities = filtered_probabilities(logits, params)
    assert (np.diff(ids) > 0).all()
    full = np.zeros(logits.size)
    full[ids] = probabilities
    return full


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
def test_filters_are_those_of_transformers(filters: dict, spread: float) -> None:
    params = SamplingParams(**filters)
    for size in (5, 300, 2000):
        logits = (RANDOM.normal(size=size) * spread).astype(np.float32)
        expected = by_transformers(logits, params)
        found = dense(logits, params)
        assert (found > 0).tolist() == (expected > 0).tolist()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = RANDOM.normal(size=50).astype(np.float32)
    seen = [3, 3, 10, 49]
    process = hf.RepetitionPenaltyLogitsProcessor(penalty)
    expected = process(torch.tensor([seen]), torch.from_numpy(logits)[None].clone())[0]
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), seen)
    before = logits.copy()
    np.testing.assert_array_equal(sampler._penalize(logits), expected.numpy())
    np.testing.assert_array_equal(logits, before)


def test_penalty_holds_for_greedy_and_for_what_is_generated() -> None:
    logits = np.array([4.0, 3.9, 3.0, -1.0], np.float32)
    assert [Sampler(SamplingParams()).choose(logits) for _ in range(2)] == [0, 0]
    sampler = Sampler(SamplingParams(repetition_penalty=1.2))
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 0]
    assert Sampler(SamplingParams(repetition_penalty=1.2), seen=[0]).choose(logits) == 1


def test_nucleus_against_a_plain_reference() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    kept = lambda p: np.flatnonzero(dense(logits, SamplingParams(temperature=1, top_p=p)))  # noqa: E731
    assert kept(0.4).tolist() == [0]
    assert kept(0.6).tolist() == [0, 1]
    assert kept(0.8).tolist() == [0, 1, 2]
    assert kept(0.95).tolist() == [0, 1, 2, 3]


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.0001, 0.3, 0.1999])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5))
    logits = np.log(probabilities).astype(np.float32)
    count = 20_000
    found = np.bincount([sampler.choose(logits) for _ in range(count)], minlength=4) / count
    # Four standard deviations of a binomial share.
    bound = 4 * np.sqrt(probabilities * (1 - probabilities) / count)
    assert (np.abs(found - probabilities) <= bound + 1e-9).all()


def test_a_dropped_token_is_never_drawn() -> None:
    logits = np.zeros(6, np.float32)
    logits[4] = 0.5
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=1, seed=0))
    assert {sampler.choose(logits) for _ in range(200)} == {4}


def test_seeds_reproduce_and_differ() -> None:
    logits = RANDOM.normal(size=(30, 100)).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(row) for row in logits]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [1e-320, 1e-6, 1e6])
def test_extreme_numbers_stay_finite(temperature: float) -> None:
    logits = np.array([3e38, -3e38, 2.9e38, 0.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, probabilities = filtered_probabilities(
            logits, SamplingParams(temperature=temperature, top_p=0.9, min_p=0.01)
        )
    assert probabilities.sum() == pytest.approx(1)
    assert math.isclose(probabilities[0], 1)


def test_greedy_takes_the_first_of_equals_and_ignores_filters() -> None:
    logits = np.array([1, 7, 7, 0], np.float32)
    assert Sampler(SamplingParams(top_k=3, top_p=0.1, min_p=0.5)).choose(logits) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad: float, temperature: float) -> None:
    logits = np.array([1, bad, 7, bad], np.float32)
    with pytest.raises(EngineError, match="gave 2 of 4 logits that are not finite"):
        Sampler(SamplingParams(temperature=temperature)).choose(logits)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; give a whole number of at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"top_k": -1}, "top_k is -1; give a whole number of at least 0"),
        ({"draft_tokens": -1}, "draft_tokens is -1; give a whole number of at least 0"),
        ({"draft_tokens": 1.5}, "draft_tokens is 1.5; .* or None for as many as pay"),
        ({"draft_tokens": True}, "draft_tokens is True"),
        ({"seed": -3}, "seed is -3; give a whole number of at least 0"),
        ({"temperature": -0.1}, "temperature is -0.1; give a number of 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0; give a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.5}, "min_p is -0.5; give a number from 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; give a number above 0"),
        ({"stop": ("a", "")}, r"stop is \('a', ''\); give texts of at least one"),
        ({"stop": (3,)}, r"stop is \(3,\)"),
        ({"stop": 3}, "stop is 3; give texts"),
    ],
)
def test_settings_that_cannot_be_used(setting: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**setting)


def test_stop_may_be_one_text_or_a_list() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_override() -> None:
    base = SamplingParams(temperature=0.5, seed=4)
    changed = base.override(seed=5, stop="x")
    assert (changed.temperature, changed.seed, changed.stop) == (0.5, 5, ("x",))
    assert base.seed == 4
    with pytest.raises(
        InputError, match="no sampling setting topk; there are max_tokens, temp"
    ):
        base.override(topk=3)
    with pytest.raises(InputError, match="top_p is 7"):
        base.override(top_p=7)
