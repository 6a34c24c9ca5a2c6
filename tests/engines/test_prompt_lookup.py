"""What is guessed from the text so far, and how much of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.prompt_lookup import (
    LONGEST,
    SHORTEST,
    STEP_COSTS,
    DraftLength,
    PromptLookup,
)

VOCAB = 100


def guess(ids: list[int], count: int) -> list[int]:
    return PromptLookup(ids, VOCAB).guess(count)


def test_the_longest_run_counts_first() -> None:
    """2, 3 stood before 8 last, but 1, 2, 3 before 9."""
    assert guess([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], 1) == [9]
    assert guess([1, 2, 3, 9, 5, 2, 3, 8, 4, 2, 3], 1) == [8]


def test_the_most_recent_place_counts() -> None:
    assert guess([1, 2, 7, 5, 1, 2, 8, 6, 1, 2], 3) == [8, 6, 1]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([4, 5, 6, 4, 5, 6], [4, 5, 6, 4, 5, 6, 4]),
        ([7, 7, 7], [7] * 7),
        ([1, 2, 3, 1, 2], [3, 1, 2, 3, 1, 2, 3]),
    ],
)
def test_where_the_text_ends_its_period_goes_on(ids: list[int], expected: list[int]) -> None:
    for count in range(8):
        assert guess(ids, count) == expected[:count]


@pytest.mark.parametrize(
    "ids", [[], [1], [1, 1], [1, 2, 3, 4], [1, 2, 3, 4, 2], [1, 2, 9, 2, 1]]
)
def test_of_what_is_not_known_nothing_is_guessed(ids: list[int]) -> None:
    assert guess(ids, 5) == []


def test_rows_of_images_are_never_guessed() -> None:
    assert guess([1, 2, VOCAB, VOCAB + 1, 3, 1, 2], 4) == []
    assert guess([1, 2, 3, VOCAB, 1, 2], 4) == [3]
    assert guess([VOCAB, VOCAB + 1, 3, 4, VOCAB, VOCAB + 1], 2) == [3, 4]


def plainly(ids: list[int], count: int) -> list[int]:
    """The same, by a walk through the text."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        for place in range(len(ids) - 1, size - 1, -1):
            if ids[place - size : place] == ids[len(ids) - size :]:
                going_on = ids[place:]
                while len(going_on) < count:
                    going_on = going_on + ids[place:]
                found = going_on[:count]
                ends = [i for i, id_ in enumerate(found) if id_ >= VOCAB]
                return found[: min(ends, default=count)]
    return []


@given(
    st.lists(st.sampled_from([1, 2, 3, VOCAB]), max_size=30),
    st.lists(st.sampled_from([1, 2, 3]), max_size=10),
    st.integers(0, 9),
)
def test_it_is_a_walk_through_the_text(given_: list[int], said: list[int], count: int) -> None:
    lookup = PromptLookup(given_, VOCAB)
    for end in range(len(said) + 1):
        found = lookup.guess(count)
        assert found == plainly(given_ + said[:end], count)
        assert all(id_ < VOCAB for id_ in found)
        if end < len(said):
            lookup.append(said[end])


def taught(most: int, *checks: tuple[int, int]) -> DraftLength:
    length = DraftLength(most)
    for guessed, right in checks:
        length.learn(guessed, right)
    return length


@pytest.mark.parametrize("most", range(12))
def test_never_more_than_allowed(most: int) -> None:
    length, longest = DraftLength(most), min(most, len(STEP_COSTS) - 1)
    found = []
    for _ in range(60):
        found.append(length.choose())
        length.learn(4, 4)
    assert found == sorted(found), "more with each success"
    assert found[0] == min(most, 1)
    gains = [(count + 1) / STEP_COSTS[count] for count in range(longest + 1)]
    assert found[-1] == gains.index(max(gains)), "what pays most where all is right"


def test_what_is_never_right_is_not_run() -> None:
    length = DraftLength(5)
    for _ in range(30):
        length.learn(max(length.choose(), 1), 0)
    assert length.choose() == 0


def test_guesses_that_would_have_been_right_bring_it_back() -> None:
    length = taught(5, *[(1, 0)] * 30)
    steps = 0
    while length.choose() == 0:
        length.learn(1, 1)
        steps += 1
        assert steps < 10
    assert steps > 0


def test_tokens_behind_the_first_wrong_one_say_nothing() -> None:
    assert taught(7, (5, 0)) == taught(7, (1, 0))
    assert taught(7, (5, 2)) == taught(7, (2, 2), (1, 0))
    assert taught(7, (3, 3)) == taught(7, (1, 1), (1, 1), (1, 1))
    assert taught(7, (3, 3)) != taught(7, (3, 2))


@given(st.lists(st.booleans(), max_size=40))
def test_the_choice_gives_most_tokens_a_step(rights: list[bool]) -> None:
    length = taught(7, *[(1, int(right)) for right in rights])
    share = 0.7
    for right in rights:
        share = 0.85 * share + 0.15 * right
    gains = [
        sum(share**n for n in range(count + 1)) / cost for count, cost in enumerate(STEP_COSTS)
    ]
    assert gains[length.choose()] == pytest.approx(max(gains))
