"""The choice behind each of several ids, and which cache a decoder is bound to."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.kv_cache import HostKvCache, KvCache
from mvlm_export.engines.ort_session import OrtBackend, OrtDecoder

from .bundles import ONE_THREAD
from .conftest import CHOICES, CONFIG, TinyModel

EMBEDS = np.random.default_rng(1).normal(size=(4, CONFIG.text.hidden_size)).astype(np.float32)
VOCAB = CONFIG.text.vocab_size
IDS = np.array([1, 40, 512, 513, 90, 515, 7, 300, 11, 12], np.int32)


def open_decoder(model: TinyModel, **manifest: object) -> OrtDecoder:
    bundle = Bundle.load(model.path, verify=False)
    bundle = Bundle(bundle.path, replace(bundle.manifest, **manifest))  # type: ignore[arg-type]
    return OrtBackend(bundle, ONE_THREAD).open_decoder()


@pytest.fixture(scope="module")
def decoder(choosing: TinyModel) -> OrtDecoder:
    return open_decoder(choosing)


def one_by_one(decoder: OrtDecoder, ids: np.ndarray) -> tuple[KvCache, list[np.ndarray]]:
    cache = decoder.new_cache()
    return cache, [decoder.append(cache, ids[n : n + 1], EMBEDS) for n in range(len(ids))]


@settings(max_examples=12)
@given(
    before=st.lists(st.integers(0, VOCAB + 3), max_size=12),
    ids=st.lists(st.integers(0, VOCAB + 3), min_size=1, max_size=CHOICES),
)
def test_a_choice_behind_each_id(
    decoder: OrtDecoder, before: list[int], ids: list[int]
) -> None:
    whole = np.array([*before, *ids], np.int32)
    expected, logits = one_by_one(decoder, whole)
    cache = decoder.new_cache()
    if before:
        decoder.append(cache, whole[: len(before)], EMBEDS)
    found = decoder.append_choices(cache, whole[len(before) :], EMBEDS)
    assert found == [int(row.argmax()) for row in logits[len(before) :]]
    assert cache.length == len(whole)
    for tensor in range(cache.shape.tensors):
        rows = [c.read_rows(tensor, 0, len(whole)) for c in (cache, expected)]
        np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


@pytest.mark.parametrize("count", [1, CHOICES - 1, CHOICES, CHOICES + 1, len(IDS)])
def test_of_more_ids_than_rows_the_last_counts(decoder: OrtDecoder, count: int) -> None:
    expected = one_by_one(decoder, IDS[:count])[1][-1]
    found = decoder.append(decoder.new_cache(), IDS[:count], EMBEDS)
    assert found.shape == (VOCAB,)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    chosen = decoder.append_greedy(decoder.new_cache(), IDS[:count], EMBEDS)
    assert chosen == expected.argmax()


def test_more_ids_than_choices_are_refused(decoder: OrtDecoder) -> None:
    cache = decoder.new_cache()
    message = f"{CHOICES + 1} choices were asked for, .* gives {CHOICES} at most; give fewer"
    with pytest.raises(EngineError, match=message):
        decoder.append_choices(cache, IDS[: CHOICES + 1], EMBEDS)
    assert cache.length == 0
    assert len(decoder.append_choices(cache, IDS[:CHOICES], EMBEDS)) == CHOICES


def test_how_many_choices_each_graph_gives(
    decoder: OrtDecoder, tiny: TinyModel, tiny_fixed: TinyModel
) -> None:
    assert (decoder.most_choices, decoder.chooses_greedily) == (CHOICES, True)
    none, one = open_decoder(tiny), open_decoder(tiny_fixed)
    assert (none.most_choices, none.chooses_greedily) == (0, False)
    assert (one.most_choices, one.chooses_greedily) == (1, True)
    with pytest.raises(EngineError, match=r"1 choices were asked for, .* gives 0 at most"):
        none.append_choices(none.new_cache(), IDS[:1], EMBEDS)
    with pytest.raises(EngineError, match=r"2 choices were asked for, .* gives 1 at most"):
        one.append_choices(one.new_cache(), IDS[:2], EMBEDS)
    cache = one.new_cache()
    logits = one.append(one.new_cache(), IDS[:1], EMBEDS)
    assert one.append_choices(cache, IDS[:1], EMBEDS) == [logits.argmax()]


@pytest.mark.parametrize("rows", [CHOICES - 2, CHOICES + 2])
def test_a_manifest_that_says_other_rows(choosing: TinyModel, rows: int) -> None:
    """An error, and nothing is written beyond a buffer."""
    decoder = open_decoder(choosing, logits_rows=rows)
    cache = decoder.new_cache()
    with pytest.raises(EngineError, match="cannot run the graph 'decoder'"):
        decoder.append(cache, IDS, EMBEDS)
    assert cache.length == 0


# Bindings.


def test_two_caches_in_turn(decoder: OrtDecoder) -> None:
    sequences = [IDS, IDS[::-1].copy()]
    expected = [one_by_one(decoder, ids)[1] for ids in sequences]
    caches = [decoder.new_cache() for _ in sequences]
    for place in range(len(IDS)):
        for cache, ids, logits in zip(caches, sequences, expected, strict=True):
            id_ = ids[place : place + 1]
            if place % 3 == 0:  # the two bindings, of logits and of tokens, in turn too
                found = decoder.append(cache, id_, EMBEDS)
                np.testing.assert_array_equal(found, logits[place])
            else:
                assert decoder.append_choices(cache, id_, EMBEDS) == [logits[place].argmax()]


def test_a_new_cache_in_the_place_of_one_that_is_gone(decoder: OrtDecoder) -> None:
    """Python gives its identity to the next, but not its memory."""
    expected = one_by_one(decoder, IDS)[1]
    cache: KvCache | None = decoder.new_cache()
    assert isinstance(cache, HostKvCache)
    arrays = [cache.past(tensor).base for tensor in range(4)]  # so that its memory stays taken
    decoder.append(cache, IDS[::-1].copy(), EMBEDS)
    gone = id(cache)
    cache = None
    gc.collect()
    others = []
    for _ in range(50):
        others.append(decoder.new_cache())
        if id(others[-1]) == gone:
            break
    assert len(arrays) == 4
    for other in others[-2:]:
        for place, logits in enumerate(expected):
            found = decoder.append(other, IDS[place : place + 1], EMBEDS)
            np.testing.assert_array_equal(found, logits)


def test_a_cache_that_was_bound_by_halves_is_bound_again(decoder: OrtDecoder) -> None:
    expected = one_by_one(decoder, IDS[:2])[1]
    first, second = decoder.new_cache(), decoder.new_cache()
    decoder.append(first, IDS[:1], EMBEDS)
    place = second.new_address

    def interrupt(tensor: int) -> int:
        if tensor == 2:
            raise KeyboardInterrupt
        return place(tensor)

    second.new_address = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        decoder.append(second, IDS[:1], EMBEDS)
    del second.new_address
    for start in range(2):
        found = decoder.append(second, IDS[start : start + 1], EMBEDS)
        np.testing.assert_array_equal(found, expected[start])
    np.testing.assert_array_equal(decoder.append(first, IDS[1:2], EMBEDS), expected[1])
