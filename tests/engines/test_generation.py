"""What ends an answer, token by token, on a scripted decoder: a second backend, so to say."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.generation import StopScanner
from mvlm_export.engines.kv_cache import CacheShape, HostKvCache, KvCache
from mvlm_export.engines.ort_session import OrtBackend
from mvlm_export.engines.session import BackendOptions
from mvlm_export.engines.vlm import VLM

from .conftest import CONFIG, TinyModel

QUESTION = "What is on the table?"
PICTURES = [np.full((40, 30, 3), shade, np.uint8) for shade in (40, 200)]

FAKE_SHAPE = CacheShape(layers=1, heads=1, head_dim=1, capacity=512, dtype="float32")


class ScriptedDecoder:
    """Another backend's decoder; ``script`` says the next id from all ids so far."""

    def __init__(self, script: Callable[[list[int]], int]) -> None:
        self.script = script
        self.calls: list[list[int]] = []

    chooses_greedily = False

    def new_cache(self) -> KvCache:
        return HostKvCache(FAKE_SHAPE)

    def append(self, cache: KvCache, ids: np.ndarray, image_embeds: np.ndarray) -> np.ndarray:
        assert len(image_embeds) >= 1
        assert isinstance(cache, HostKvCache)
        self.calls.append(ids.tolist())
        cache.new(0, len(ids))[:, 0, 0] = ids
        cache.advance(len(ids))
        logits = np.zeros(512, np.float32)
        next_id = self.script(cache.past(0)[:, 0, 0].astype(int).tolist())
        logits[next_id] = 9 if next_id >= 0 else np.nan
        return logits


def scripted(tiny: TinyModel, answers: list[str], end: int = 2) -> tuple[VLM, ScriptedDecoder]:
    """A VLM whose n-th turn says the n-th text in the tokenizer's tokens, then ``end``."""
    bundle = Bundle.load(tiny.path)
    mark = "ASSISTANT:"

    def script(ids: list[int]) -> int:
        text = vlm.text_model.tokenizer
        marker = text.encode(mark, bos=False)
        places = [i for i in range(len(ids)) if ids[i : i + len(marker)] == marker]
        said = ids[places[-1] + len(marker) :]
        whole = text.encode(f"{mark} {answers[len(places) - 1]}", bos=False)
        wanted = whole[len(text.encode(mark, bos=False)) :]
        assert wanted[: len(said)] == said
        return wanted[len(said)] if len(said) < len(wanted) else end

    decoder = ScriptedDecoder(script)
    rows = np.ones((1, CONFIG.image_tokens, 64), np.float32)
    graph = SimpleNamespace(name="graph", run=lambda array: rows)
    backend = SimpleNamespace(open_graph=lambda name: graph, open_decoder=lambda: decoder)
    vlm = VLM(bundle, backend)
    return vlm, decoder


ANSWER = "I see two red cups and a book. How many people?"


def test_the_model_ends_its_answer(tiny: TinyModel) -> None:
    vlm, decoder = scripted(tiny, [ANSWER])
    answer = vlm.generate(None, QUESTION)
    assert (answer.text, answer.finish_reason, answer.ids[-1]) == (ANSWER, "stop", 2)
    assert [len(call) for call in decoder.calls[1:]] == [1] * (len(answer.ids) - 1)


def test_further_stop_ids_and_ignoring_them(tiny: TinyModel) -> None:
    vlm, _ = scripted(tiny, ["Hello"], end=9)
    stops = frozenset({2, 9})
    vlm.text_model = replace(vlm.text_model, stop_ids=stops)
    answer = vlm.generate(None, QUESTION)
    assert (answer.text, answer.finish_reason, answer.ids[-1]) == ("Hello", "stop", 9)
    vlm, decoder = scripted(tiny, ["Hello"])
    decoder.script = lambda ids: 2
    answer = vlm.generate(None, QUESTION, max_tokens=5, ignore_eos=True)
    assert (answer.ids, answer.text, answer.finish_reason) == ((2,) * 5, "", "length")


@pytest.mark.parametrize("count", [1, 4])
def test_max_tokens(tiny: TinyModel, count: int) -> None:
    vlm, decoder = scripted(tiny, [ANSWER])
    answer = vlm.generate(None, QUESTION, max_tokens=count)
    assert (len(answer.ids), answer.finish_reason) == (count, "length")
    assert ANSWER.startswith(answer.text)
    assert len(decoder.calls) == count
    assert answer.timings.decode_tokens == count - 1


@pytest.mark.parametrize("width", [1, 2, 3, 5, 9])
def test_a_stop_string_is_never_shown_whatever_tokens_it_spans(
    tiny: TinyModel, width: int
) -> None:
    vlm, _ = scripted(tiny, [ANSWER])
    for start in range(0, len(ANSWER) - width, 3):
        stop = ANSWER[start : start + width]
        stream = vlm.stream(None, QUESTION, stop=["not there", stop])
        shown = "".join(stream)
        assert shown == stream.answer.text == ANSWER[: ANSWER.index(stop)]
        assert stream.answer.finish_reason == "stop_string"


def test_a_beginning_of_a_stop_string_is_shown_once_it_is_none(tiny: TinyModel) -> None:
    vlm, _ = scripted(tiny, [ANSWER])
    answer = vlm.generate(None, QUESTION, stop=["people?!", "red cups or"])
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=6),
)
def test_stop_scanner_is_the_same_by_any_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [
        (end, -len(stop))
        for stop in stops
        for end in range(len(text) + 1)
        if text[:end].endswith(stop)
    ]
    end, width = min(ends, default=(len(text), 0))
    scanner, shown = StopScanner(stops), ""
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for first, last in pairwise(bounds):
        shown += scanner.feed(text[first:last])
        assert text[: end + width].startswith(shown)
    shown += scanner.finish()
    assert shown == text[: end + width]
    assert scanner.stopped == bool(ends)


def test_the_answer_ends_where_the_context_does(tiny: TinyModel) -> None:
    vlm, _ = scripted(tiny, [ANSWER])
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION, 1))
    vlm.model = replace(vlm.model, max_positions=len(prompt) + 3)
    answer = vlm.generate(PICTURES[0], QUESTION, max_tokens=4)
    assert (len(answer.ids), answer.finish_reason) == (3, "context")
    answer = vlm.generate(PICTURES[0], QUESTION, max_tokens=3)
    assert (len(answer.ids), answer.finish_reason) == (3, "length")


def test_a_prompt_without_room_is_refused_before_any_work(tiny: TinyModel) -> None:
    vlm, decoder = scripted(tiny, [ANSWER])
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION, 2))
    vlm.model = replace(vlm.model, max_positions=len(prompt))
    message = (
        rf"The prompt takes {len(prompt)} positions \({len(prompt) - 8} of text, 8 of 2 "
        rf"image\(s\)\), but the model has {len(prompt)}, and at least one"
    )
    with pytest.raises(InputError, match=message):
        vlm.stream(["no such file"] * 2, QUESTION)
    with pytest.raises(InputError, match=message):
        vlm.chat().stream(QUESTION, ["no such file"] * 2)
    assert decoder.calls == []


def test_later_turns_prefill_what_is_new_only(tiny: TinyModel) -> None:
    """An answer in the tokenizer's own tokens is in the cache up to its </s>."""
    vlm, decoder = scripted(tiny, ["I see two cups", "Three people", "A book"])
    chat = vlm.chat()
    first = chat.ask("What?", PICTURES[0])
    ran = sum(map(len, decoder.calls))
    second = chat.ask("How many people?")
    assert (first.text, second.text) == ("I see two cups", "Three people")
    assert second.timings.cached_tokens == ran
    assert decoder.calls[len(first.ids)][0] == 2
    third = chat.ask("And this?", PICTURES[1])
    assert third.text == "A book"
    whole = vlm.tokenize(chat.conversation).ids
    np.testing.assert_array_equal(chat._state.ids, whole[:-1])
    # Every id was run once: nothing twice, nothing missing.
    assert list(chain(*decoder.calls)) == whole[:-1].tolist()


def test_a_cut_answer_is_run_again_from_where_it_was_cut(tiny: TinyModel) -> None:
    vlm, decoder = scripted(tiny, [ANSWER, "Three people"])
    chat = vlm.chat()
    cut = chat.ask("What?", stop="cups")
    assert cut.text == "I see two red "
    decoder.script = lambda ids: 2
    chat.ask("How many?")
    text = chat.conversation.render()
    assert "ASSISTANT: I see two red </s>USER: How many?" in text
    whole = vlm.tokenize(chat.conversation).ids
    np.testing.assert_array_equal(chat._state.ids, whole[:-1])


def test_a_closed_stream_leaves_everything_usable(tiny: TinyModel) -> None:
    vlm, _ = scripted(tiny, [ANSWER])
    with vlm.stream(None, QUESTION) as stream:
        shown = next(stream) + next(stream)
    answer = stream.answer
    assert (answer.text, answer.finish_reason) == (shown, "interrupted")
    assert ANSWER.startswith(shown)
    assert list(stream) == []
    assert len(vlm._states.free) == 1
    assert vlm.generate(None, QUESTION).text == ANSWER
    assert len(vlm._states.free) == 1


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nothing refers to any more goes."""
    gc.disable()
    yield
    gc.enable()


def test_a_dropped_stream_is_closed_at_once(tiny: TinyModel, no_collector: None) -> None:
    vlm, decoder = scripted(tiny, [ANSWER])
    for _ in range(3):
        for _ in vlm.stream(None, QUESTION):
            break
        assert len(vlm._states.free) == 1
    decoder.script = lambda ids: -1
    with pytest.raises(EngineError):
        vlm.generate(None, QUESTION)
    assert len(vlm._states.free) == 1


def test_a_dropped_chat_is_gone_at_once(tiny: TinyModel, no_collector: None) -> None:
    vlm, _ = scripted(tiny, [ANSWER, ANSWER])
    chat = vlm.chat()
    shown = next(chat.stream("What?", PICTURES[0]))
    assert [turn.answer for turn in chat.conversation.turns] == [shown]
    assert chat.ask("How many?").text == ANSWER
    cache = weakref.ref(chat._state.cache)
    del chat
    assert cache() is None


def test_a_stream_that_was_not_started_has_no_answer(tiny: TinyModel) -> None:
    vlm, decoder = scripted(tiny, [ANSWER])
    stream = vlm.stream(None, QUESTION)
    with pytest.raises(InputError, match="There is no answer yet: read the stream"):
        _ = stream.answer
    stream.close()
    assert list(stream) == []
    assert decoder.calls == []


def test_ctrl_c_in_a_chat_keeps_what_was_said(tiny: TinyModel) -> None:
    vlm, decoder = scripted(tiny, [ANSWER, "Three people"])
    chat = vlm.chat()
    stream = chat.stream("What?", PICTURES[0])
    shown = next(stream) + next(stream)
    script = decoder.script

    def interrupt(ids: list[int]) -> int:
        raise KeyboardInterrupt

    decoder.script = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert (stream.answer.text, stream.answer.finish_reason) == (shown, "interrupted")
    decoder.script = script
    assert chat.ask("How many?").text == "Three people"
    assert [turn.answer for turn in chat.conversation.turns] == [shown, "Three people"]
    np.testing.assert_array_equal(chat._state.ids, vlm.tokenize(chat.conversation).ids[:-1])


def test_the_next_question_ends_a_stream_that_hangs(tiny: TinyModel) -> None:
    vlm, _ = scripted(tiny, [ANSWER, "Three people"])
    chat = vlm.chat()
    hanging = chat.stream("What?")
    shown = next(hanging)
    assert chat.ask("How many?").text == "Three people"
    assert hanging.answer.finish_reason == "interrupted"
    assert [turn.answer for turn in chat.conversation.turns] == [shown, "Three people"]


def test_numbers_that_are_not_finite_are_an_error_and_the_turn_is_forgotten(
    tiny: TinyModel,
) -> None:
    vlm, decoder = scripted(tiny, [ANSWER])
    chat = vlm.chat()
    script = decoder.script
    for steps in (1, 3):
        decoder.calls.clear()
        decoder.script = lambda ids, n=steps: -1 if len(decoder.calls) == n else script(ids)
        with pytest.raises(EngineError, match="1 of 512 logits that are not finite"):
            chat.ask("What?")
        with pytest.raises(EngineError, match="not finite"):
            decoder.calls.clear()
            vlm.generate(None, QUESTION)
        assert chat.conversation.turns == ()
    decoder.script = script
    assert chat.ask("What?").text == ANSWER
    assert vlm.generate(None, QUESTION).text == ANSWER


def test_a_projector_of_another_size(altered: Callable[..., Bundle]) -> None:
    bundle = altered({"image_tokens": 9})
    vlm = VLM(bundle, OrtBackend(bundle, BackendOptions(threads=1)))
    with pytest.raises(EngineError, match="gave 4 rows for an image, but the manifest says 9"):
        vlm.generate(PICTURES[0], QUESTION)
