"""Which cache rows are reused: those of the same ids and the same pictures, no others."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.decoder_state import FREE_STATES, DecoderState, StatePool
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.kv_cache import CacheShape, HostKvCache
from mvlm_export.engines.prefix import PromptPrefix
from mvlm_export.engines.prompt import PromptIds

VOCAB = 100
EMBEDS = np.zeros((1, 1), np.float32)


class RowDecoder:
    """A decoder whose cache rows are the ids, and which needs no graph."""

    chooses_greedily = False

    def __init__(self, form: str = "append") -> None:
        self.shape = CacheShape(1, 1, 1, 64, "float32", form)  # type: ignore[arg-type]
        self.made = 0

    def new_cache(self) -> HostKvCache:
        self.made += 1
        return HostKvCache(self.shape)

    def append(self, cache: HostKvCache, ids: np.ndarray, embeds: np.ndarray) -> np.ndarray:
        for tensor in range(2):
            cache.new(tensor, len(ids))[:, 0, 0] = ids
        cache.advance(len(ids))
        return np.zeros(VOCAB, np.float32)


def prompt_of(*parts: int | str) -> tuple[PromptIds, tuple[str, ...]]:
    """Numbers are text ids; a text is a picture of two rows."""
    ids: list[int] = []
    spans, images = [], []
    for part in parts:
        if isinstance(part, str):
            first = VOCAB + 2 * len(images)
            spans.append((len(ids), len(ids) + 2))
            ids += [first, first + 1]
            images.append(part)
        else:
            ids.append(part)
    return PromptIds(np.array(ids, np.int32), tuple(spans)), tuple(images)


def filled(*parts: int | str, decoder: RowDecoder | None = None) -> DecoderState:
    state = DecoderState(decoder or RowDecoder())  # type: ignore[arg-type]
    prompt, images = prompt_of(*parts)
    state.rewind(prompt, images)
    state.prefill(prompt, EMBEDS)
    return state


@pytest.mark.parametrize(
    ("parts", "shared"),
    [
        ((1, "cat", 5, "dog", 6), 7),
        ((1, "cat", 5, "dog", 7), 6),
        ((1, "cat", 5, "cow", 6), 4),
        ((1, "cat", 8, "dog", 6), 3),
        ((1, "cow", 5, "dog", 6), 1),
        ((1, "dog", 5, "cat", 6), 1),
        ((1, 5), 1),
        (("cat", 5), 0),
        ((1, "cat"), 3),
    ],
)
def test_rows_of_another_picture_are_never_shared(
    parts: tuple[int | str, ...], shared: int
) -> None:
    state = filled(1, "cat", 5, "dog", 6)
    prompt, images = prompt_of(*parts)
    assert state.shared_rows(prompt, images) == shared
    assert state.rewind(prompt, images).count == min(shared, len(prompt) - 1)


def test_pictures_that_are_not_known_are_shared_with_none() -> None:
    state = filled(1, "cat", 5)
    prompt, images = prompt_of(1, "cat", 6)
    assert state.shared_rows(prompt, ()) == 1
    state.rewind(prompt, ())
    state.prefill(prompt, EMBEDS)
    assert state.shared_rows(prompt, images) == 1


def test_a_picture_half_in_the_cache() -> None:
    state = filled(1, "cat", 5)
    state.cache.truncate(2)
    prompt, images = prompt_of(1, "cat", 6)
    assert state.shared_rows(prompt, images) == 2
    other, cow = prompt_of(1, "cow", 6)
    assert state.shared_rows(other, cow) == 1


PARTS = st.lists(st.sampled_from([1, 2, "cat", "dog"]), min_size=1, max_size=6)


@given(st.lists(PARTS, min_size=1, max_size=6), st.booleans())
def test_the_cache_is_always_that_of_the_last_prompt(
    prompts: list[list[int | str]], with_prefix: bool
) -> None:
    """Rows of pictures are told apart by what was written when they were run."""
    prefix_ids = np.array([1, 2, 1], np.int32)
    rows = prefix_ids.astype(np.float32).reshape(3, 1, 1)
    prefix = PromptPrefix(prefix_ids, (rows, rows)) if with_prefix else None
    decoder = RowDecoder()
    state = DecoderState(decoder, prefix)  # type: ignore[arg-type]
    kinds = {"cat": 1000, "dog": 2000}
    for parts in prompts:
        prompt, images = prompt_of(*parts)
        whole = prompt.ids.astype(np.float32)
        for (first, last), image in zip(prompt.image_spans, images, strict=True):
            whole[first:last] += kinds[image]
        kept = state.rewind(prompt, images)
        assert 0 <= kept.from_prefix <= kept.count < len(prompt)
        state.prefill(prompt, EMBEDS)
        cache = state.cache
        assert isinstance(cache, HostKvCache)
        for tensor in range(2):
            cache.past(tensor)[kept.count :, 0, 0] = whole[kept.count :]
            np.testing.assert_array_equal(cache.past(tensor)[:, 0, 0], whole)
        np.testing.assert_array_equal(state.ids, prompt.ids)


def test_after_a_failure_nothing_of_it_is_left() -> None:
    state = filled(1, 2, 3, 4, decoder=RowDecoder("fixed"))
    cache = state.cache
    assert isinstance(cache, HostKvCache)
    cache.past(1)[2:] = np.nan
    state.drop_interrupted(2)
    assert cache.length == 2
    assert np.isfinite(cache._memory[1]).all()
    assert cache.past(1)[:, 0, 0].tolist() == [1, 2]


@pytest.mark.parametrize("form", ["append", "fixed"])
def test_starting_anew_trusts_no_row(form: str) -> None:
    ids = np.array([1, 2], np.int32)
    rows = ids.astype(np.float32).reshape(2, 1, 1)
    prefix = PromptPrefix(ids, (rows, rows))
    state = DecoderState(RowDecoder(form), prefix)  # type: ignore[arg-type]
    prompt, images = prompt_of(1, 2, 3, "cat")
    state.rewind(prompt, images)
    state.prefill(prompt, EMBEDS)
    cache = state.cache
    assert isinstance(cache, HostKvCache)
    for tensor in range(2):
        cache.past(tensor)[...] = np.nan
    state.start_anew()
    assert state.ids.tolist() == [1, 2]
    for tensor in range(2):
        assert cache.past(tensor)[:, 0, 0].tolist() == [1, 2]
        assert form == "append" or np.isfinite(cache._memory[tensor]).all()
    assert state.shared_rows(prompt, images) == 2


def test_no_room_is_an_error_before_anything_is_noted() -> None:
    state = filled(1, 2, 3)
    prompt = PromptIds(np.ones(65, np.int32))
    state.rewind(prompt)
    with pytest.raises(EngineError, match="holds 1 of 64 positions"):
        state.prefill(prompt, EMBEDS)


# The pool.


def use(pool: StatePool, *parts: int | str) -> int:
    """Rows kept for a prompt, which is run then."""
    prompt, images = prompt_of(*parts)
    with pool.lease(prompt, images) as state:
        kept = state.rewind(prompt, images).count
        state.prefill(prompt, EMBEDS)
    return kept


def pool_of(count: int, reuse: bool = True) -> tuple[StatePool, RowDecoder]:
    decoder = RowDecoder()
    pool = StatePool(decoder, None, reuse)  # type: ignore[arg-type]
    with ExitStack() as stack:
        for _ in range(count):
            state = stack.enter_context(pool.lease(*prompt_of(1)))
            state.prefill(prompt_of(1)[0], EMBEDS)
    return pool, decoder


def test_the_state_that_holds_most_is_taken() -> None:
    pool, decoder = pool_of(2)
    use(pool, 1, "cat", 5)
    use(pool, 1, "dog", 5)
    assert decoder.made == 2
    assert use(pool, 1, "cat", 6, 7) == 3
    assert use(pool, 1, "dog", 6) == 3
    assert use(pool, 1, "cat", 6, 8) == 4
    assert decoder.made == 2


def test_of_equals_the_one_longest_unused_goes() -> None:
    pool, _ = pool_of(2)
    use(pool, 1, "cat", 5)
    use(pool, 1, "dog", 5)
    use(pool, 1, "cow", 5)
    assert use(pool, 1, "dog", 6) == 3
    assert use(pool, 1, "cow", 6) == 3


def test_without_reuse_every_lease_begins_anew() -> None:
    pool, decoder = pool_of(1, reuse=False)
    assert [use(pool, 1, "cat", 5) for _ in range(2)] == [0, 0]
    assert decoder.made == 1


def test_a_leased_state_is_nobody_elses() -> None:
    pool, decoder = pool_of(0)
    prompt, images = prompt_of(1, "cat", 5)
    use(pool, 1, "cat", 5)
    with pool.lease(prompt, images) as first, pool.lease(prompt, images) as second:
        assert first is not second
        assert (first.cache.length, second.cache.length) == (4, 0)
    assert len(pool.free) == decoder.made == 2


def test_a_state_comes_back_after_an_error() -> None:
    pool, _ = pool_of(0)
    with pytest.raises(KeyboardInterrupt), pool.lease(*prompt_of(1)):
        raise KeyboardInterrupt
    assert len(pool.free) == 1


def test_the_states_longest_unused_are_dropped() -> None:
    pool, _ = pool_of(0)
    prompt, images = prompt_of(1)
    leases = [pool.lease(prompt, images) for _ in range(FREE_STATES + 2)]
    states = [lease.__enter__() for lease in leases]
    for lease in leases:
        lease.__exit__(None, None, None)
    assert all(a is b for a, b in zip(pool.free, states[2:], strict=True))


def test_a_finalizer_may_end_a_lease_while_another_begins() -> None:
    """The garbage collector runs where it likes; with a lock this would wait for itself."""
    pool, _ = pool_of(1)
    prompt, images = prompt_of(1, "cat")
    ending = [pool.lease(prompt, images)]
    state = ending[0].__enter__()
    other = pool.new_state()
    pool.free.append(other)
    shared_rows = other.shared_rows

    def collect(*arguments: object) -> int:
        while ending:
            ending.pop().__exit__(None, None, None)
        return shared_rows(*arguments)  # type: ignore[arg-type]

    other.shared_rows = collect  # type: ignore[method-assign]
    thread = threading.Thread(target=use, args=(pool, 1, "cat"), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert pool.free == [state, other]


def test_a_state_that_another_takes_meanwhile_is_left_to_it() -> None:
    pool, decoder = pool_of(2)
    taken = []

    def take(*arguments: object) -> int:
        if first in pool.free:
            taken.append(pool.free.pop(0))
        return 9

    first = pool.free[0]
    first.shared_rows = take  # type: ignore[method-assign]
    second = pool.free[1]
    with pool.lease(*prompt_of(1)) as state:
        assert state is second
    assert taken == [first]
    assert decoder.made == 2


def test_threads_never_share_a_state() -> None:
    pool, _ = pool_of(0)
    inside: set[int] = set()
    clashes: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            prompt, images = prompt_of(
                1, str(rng.choice(["cat", "dog"])), int(rng.integers(9))
            )
            with pool.lease(prompt, images) as state:
                if id(state) in inside:
                    clashes.append(id(state))
                inside.add(id(state))
                state.rewind(prompt, images)
                state.prefill(prompt, EMBEDS)
                if state.ids.tolist() != prompt.ids.tolist():
                    clashes.append(id(state))
                inside.discard(id(state))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert 1 <= len(pool.free) <= 4
