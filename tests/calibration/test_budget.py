"""Budgets: what is read, what is chosen, and how far that can be from the best."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.calibration.budget import Budget, Option, choose_mix
from mvlm_export.calibration.layer_rounding import FLOAT, Candidate
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.errors import InputError

INT4 = Candidate(WeightFormat(4, 128))
INT8 = Candidate(WeightFormat(8))
CANDIDATES = (INT4, INT8, FLOAT)

GOOD = {
    "350MB": Budget(bytes=350_000_000),
    " 1.2 gb ": Budget(bytes=1_200_000_000),
    "500MiB": Budget(bytes=500 * 2**20),
    "77b": Budget(bytes=77),
    ".5kB": Budget(bytes=500),
    "0.01nats": Budget(nats=0.01),
    "1e-3 nats": Budget(nats=0.001),
    "1 nat": Budget(nats=1.0),
}
BAD = ("", "350", "MB", "-3MB", "0MB", "0nats", "3 parsecs", "1..2MB", "nan nats", "1e3")


@pytest.mark.parametrize("text", GOOD)
def test_budgets_are_read(text):
    assert Budget.parse(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_other_texts_are_refused_with_an_example(text):
    with pytest.raises(InputError, match=r"budget"):
        Budget.parse(text)


def layers_of(*layers):
    """Layers from (bytes, loss) pairs."""
    return [
        [Option(c, size, loss) for c, (size, loss) in zip(CANDIDATES, options, strict=False)]
        for options in layers
    ]


def best_by_trying(layers, limit, of, within):
    """The least ``of`` of all mixes that are within a limit: every mix is tried."""
    found = [
        sum(of(option) for option in mix)
        for mix in itertools.product(*layers)
        if sum(within(option) for option in mix) <= limit
    ]
    return min(found)


def best_by_table(layers, limit):
    """Least loss within so many bytes, by dynamic programming over every number of bytes."""
    table = np.zeros(limit + 1)
    for options in layers:
        wider = np.full(limit + 1, np.inf)
        for option in options:
            if option.bytes <= limit:
                moved = table[: limit + 1 - option.bytes] + option.loss
                wider[option.bytes :] = np.minimum(wider[option.bytes :], moved)
        table = wider
    return float(table[limit])


PAIRS = st.tuples(st.integers(1, 40), st.integers(0, 1000).map(lambda n: n / 256))
LAYERS = st.lists(st.lists(PAIRS, min_size=1, max_size=3), min_size=1, max_size=6).map(
    lambda layers: layers_of(*layers)
)


@given(LAYERS, st.floats(0, 1))
def test_a_mix_under_bytes_is_within_one_step_of_the_best(layers, share):
    least = sum(min(o.bytes for o in options) for options in layers)
    most = sum(max(o.bytes for o in options) for options in layers)
    limit = least + int(share * (most - least))
    mix = choose_mix(layers, Budget(bytes=limit + 7), fixed=7)
    best = best_by_table(layers, limit)
    assert best == pytest.approx(
        best_by_trying(layers, limit, lambda o: o.loss, lambda o: o.bytes)
    )
    assert mix.bytes == 7 + sum(o.bytes for o in mix.options) <= limit + 7
    assert mix.loss == pytest.approx(sum(o.loss for o in mix.options))
    largest_step = max(
        max(o.loss for o in options) - min(o.loss for o in options) for options in layers
    )
    assert mix.bound - 1e-9 <= best <= mix.loss + 1e-9
    assert mix.loss <= mix.bound + largest_step + 1e-9


@given(LAYERS, st.floats(0, 1))
def test_a_mix_under_nats_is_within_one_step_of_the_smallest(layers, share):
    least = sum(min(o.loss for o in options) for options in layers)
    most = sum(max(o.loss for o in options) for options in layers)
    limit = least + share * (most - least) + 1e-6
    mix = choose_mix(layers, Budget(nats=limit), fixed=1000)
    best = 1000 + best_by_trying(layers, limit, lambda o: o.bytes, lambda o: o.loss)
    assert mix.loss <= limit + 1e-9
    largest_step = max(
        max(o.bytes for o in options) - min(o.bytes for o in options) for options in layers
    )
    assert mix.bound - 1e-6 <= best <= mix.bytes
    assert mix.bytes <= mix.bound + largest_step + 1e-6


@given(LAYERS)
def test_at_a_corner_of_the_hull_the_mix_is_the_best(layers):
    """Where the budget is what the greedy mix takes before a step, nothing is better."""
    for limit in range(sum(min(o.bytes for o in options) for options in layers), 250, 11):
        mix = choose_mix(layers, Budget(bytes=limit))
        again = choose_mix(layers, Budget(bytes=mix.bytes))
        if again.bound == pytest.approx(again.loss, abs=1e-12):
            assert again.loss == pytest.approx(best_by_table(layers, mix.bytes))


def test_the_bytes_go_where_they_save_most_loss():
    layers = layers_of(
        [(10, 1.0), (20, 0.9), (80, 0.0)],
        [(10, 5.0), (20, 0.1), (80, 0.0)],
    )
    mix = choose_mix(layers, Budget(bytes=30))
    assert [o.candidate for o in mix.options] == [INT4, INT8]
    assert (mix.bytes, mix.loss) == (30, pytest.approx(1.1))


def test_an_option_off_the_hull_is_taken_where_no_step_fits():
    layers = layers_of([(10, 10.0), (50, 9.0), (100, 0.0)])
    mix = choose_mix(layers, Budget(bytes=60))
    assert mix.options[0].candidate == INT8
    assert mix.bound == pytest.approx(float(10 - Fraction(10, 90) * 50))


def test_more_bytes_that_lose_more_are_never_taken():
    layers = layers_of([(10, 1.0), (20, 2.0), (40, 3.0)])
    assert choose_mix(layers, Budget(bytes=1000)).options[0].candidate == INT4


def test_a_budget_with_room_for_all_takes_float():
    layers = layers_of([(10, 1.0), (20, 0.5), (40, 0.0)])
    mix = choose_mix(layers, Budget(bytes=40))
    assert (mix.options[0].candidate, mix.loss, mix.bound) == (FLOAT, 0.0, 0.0)


def test_too_few_bytes_name_the_least_that_would_do():
    layers = layers_of([(100_000, 1.0), (200_000, 0.0)], [(150_001, 1.0), (300_000, 0.0)])
    with pytest.raises(InputError, match=r"0\.250 MB.*at least 0\.251MB") as caught:
        choose_mix(layers, Budget(bytes=200_000))
    named = str(caught.value).split("at least ")[1].rstrip(".")
    choose_mix(layers, Budget.parse(named))


def test_too_few_nats_name_the_least_that_would_do():
    layers = layers_of([(10, 1.0), (20, 0.5)])
    with pytest.raises(InputError, match=r"least possible is 0\.5 nats"):
        choose_mix(layers, Budget(nats=0.1))


def test_infinite_losses_are_left_where_the_budget_allows():
    """A layer whose change makes the logits infinite has no finite loss."""
    layers = layers_of([(10, float("inf")), (20, 0.1)], [(10, 0.2), (20, 0.1)])
    mix = choose_mix(layers, Budget(bytes=30))
    assert [o.bytes for o in mix.options] == [20, 10]
    mix = choose_mix(layers, Budget(bytes=25))
    assert (mix.loss, mix.bound) == (float("inf"), pytest.approx(0.2))
