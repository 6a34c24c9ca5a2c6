"""Greedy answers with guesses are those without: ONNX Runtime, in each form of the cache."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.engines.decoder_state import DecoderState
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.generation import Answer, AnswerStream, Request
from mvlm_export.engines.image_encoder import ImageRows
from mvlm_export.engines.kv_cache import HostKvCache
from mvlm_export.engines.ort_session import OrtDecoder
from mvlm_export.engines.prompt import PromptIds
from mvlm_export.engines.prompt_lookup import GreedySteps
from mvlm_export.engines.sampling import SamplingParams
from mvlm_export.engines.vlm import VLM

from .conftest import CHOICES, CONFIG, TinyModel

VOCAB = CONFIG.text.vocab_size
PICTURE = np.random.default_rng(11).integers(0, 255, (40, 30, 3), dtype=np.uint8)
NO_IMAGE = np.zeros((1, CONFIG.text.hidden_size), np.float32)
QUESTIONS = ("What is on the table?", "Why?", "red cup red cup red cup", "1 2 3 1 2 3 1 2")
LONG = {"max_tokens": 90, "ignore_eos": True}
PLAIN = {"draft_tokens": 0}


class Calls:
    """A decoder's calls: the ids of each and what was chosen, by the method's name."""

    NAMES = ("append", "append_greedy", "append_choices")

    def __init__(self, decoder: OrtDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[str, list[int], Any]] = []
        for name in self.NAMES:
            monkeypatch.setattr(decoder, name, self._noting(name, getattr(decoder, name)))

    def _noting(self, name: str, original: Any) -> Any:
        def run(cache: HostKvCache, ids: np.ndarray, embeds: np.ndarray) -> Any:
            self.made.append((name, ids.tolist(), None))
            found = original(cache, ids, embeds)
            self.made[-1] = (name, ids.tolist(), found)
            return found

        return run

    def named(self, name: str) -> list[tuple[list[int], Any]]:
        return [(ids, found) for kind, ids, found in self.made if kind == name]


@pytest.fixture
def model(choosing: TinyModel) -> VLM:
    return VLM.load(choosing.path, threads=1, verify=False)


@pytest.fixture(scope="module")
def decoder(choosing: TinyModel) -> OrtDecoder:
    return decoder_of(VLM.load(choosing.path, threads=1, verify=False))


@pytest.fixture
def calls(model: VLM, monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(decoder_of(model), monkeypatch)


def decoder_of(model: VLM) -> OrtDecoder:
    decoder = model._states._decoder
    assert isinstance(decoder, OrtDecoder)
    return decoder


def by_torch(tiny: TinyModel, prompt: list[int], answer: list[int]) -> list[int]:
    """What PyTorch chooses at each place of an answer, given what stands before it."""
    ids = np.array([*prompt, *answer[:-1]], np.int32)
    rows = tiny.full_run(ids, torch.from_numpy(NO_IMAGE))[0][len(prompt) - 1 :]
    return rows.argmax(-1).tolist()


def ask(model: VLM, ids: list[int], **settings: Any) -> AnswerStream:
    """The stream of an answer to a prompt that is given by its ids."""
    prompt = PromptIds(np.array(ids, np.int32))
    plan = model.plan(prompt, SamplingParams(), settings)
    request = Request(
        prompt,
        *plan,
        embed=lambda clock: ImageRows(NO_IMAGE),
        lease=model._states.lease,
        commit=lambda answer: None,
    )
    return AnswerStream(model.text_model, request)


def check_counts(answer: Answer) -> None:
    timings = answer.timings
    assert 0 <= timings.kept_guesses <= timings.guessed_tokens
    assert timings.kept_guesses <= timings.decode_tokens == len(answer.ids) - 1


# Steps of one state.


@pytest.mark.parametrize("most", [None, 1, 3, 99])
@settings(max_examples=6)
@given(
    once=st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=12),
    steps=st.integers(1, 60),
)
def test_steps_are_those_of_pytorch(
    choosing: TinyModel, decoder: OrtDecoder, most: int | None, once: list[int], steps: int
) -> None:
    prompt = once * 2
    given_ = PromptIds(np.array(prompt, np.int32))
    found = {}
    for allowed in (most, 0):
        state = DecoderState(decoder)
        ids = [int(state.prefill(given_, NO_IMAGE).argmax())]
        greedy = GreedySteps(state, [*prompt, ids[0]], NO_IMAGE, VOCAB, allowed)
        for done in range(steps):
            ids.append(greedy.next_id(steps - done))
            assert state.cache.length <= len(prompt) + steps
        # All rows but that of the last token, and no row of a wrong guess.
        np.testing.assert_array_equal(state.ids, [*prompt, *ids][:-1])
        found[allowed] = ids
        assert greedy.kept <= greedy.guessed <= (0 if allowed == 0 else 5 * steps)
    assert found[most] == found[0] == by_torch(choosing, prompt, found[0])


def test_a_text_that_repeats_takes_fewer_steps_than_tokens(model: VLM, calls: Calls) -> None:
    kept = dropped = 0
    for question in QUESTIONS:
        calls.made.clear()
        answer = model.generate(None, question, **LONG)
        plain = model.generate(None, question, **LONG, **PLAIN)
        assert answer.ids == plain.ids
        check_counts(answer)
        timings = answer.timings
        kept += timings.kept_guesses
        dropped += timings.guessed_tokens - timings.kept_guesses
        guesses = calls.named("append_choices")
        assert timings.guessed_tokens == sum(len(ids) - 1 for ids, _ in guesses)
        assert max(len(ids) for ids, _ in guesses) <= CHOICES
        assert plain.timings.guessed_tokens == plain.timings.kept_guesses == 0
        # Both prefill once, the plain one then takes a step a token.
        both = len(calls.named("append_greedy")) + len(guesses)
        assert both == 2 * (len(answer.ids) - 1) - timings.kept_guesses
    assert kept > 20, "else nothing was shown"
    assert dropped > 20


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7, "seed": 1}, {"repetition_penalty": 1.2}]
)
def test_only_plain_greedy_answers_guess(
    model: VLM, calls: Calls, settings: dict[str, float]
) -> None:
    answer = model.generate(None, QUESTIONS[2], draft_tokens=5, **LONG, **settings)
    assert answer.timings.guessed_tokens == answer.timings.kept_guesses == 0
    assert {name for name, *_ in calls.made} == {"append"}


def test_a_decoder_of_one_row_guesses_nothing(tiny_fixed: TinyModel) -> None:
    model = VLM.load(tiny_fixed.path, threads=1, verify=False)
    assert decoder_of(model).most_choices == 1
    answer = model.generate(None, QUESTIONS[2], draft_tokens=5, **LONG)
    assert answer.timings.guessed_tokens == 0


# Where answers end.


def test_max_tokens_is_met_exactly(model: VLM, calls: Calls) -> None:
    whole = model.generate(None, QUESTIONS[2], **LONG, **PLAIN).ids
    prompt = model.tokenize(model.conversation().ask(QUESTIONS[2], 0))
    for count in range(1, 60, 3):
        answer = model.generate(None, QUESTIONS[2], max_tokens=count, ignore_eos=True)
        assert (answer.ids, answer.finish_reason) == (whole[:count], "length")
        check_counts(answer)
        (state,) = model._states.free
        assert state.cache.length <= len(prompt) + count - 1
    assert calls.named("append_choices")


def test_a_full_cache_ends_the_answer(model: VLM) -> None:
    start = [5, 6, 7, 8] * 120
    for spare in range(8):
        prompt = [*start, *range(20, 20 + 32 - 24 + spare)]
        room = 512 - len(prompt)
        found = [ask(model, prompt, **LONG, **draft).read() for draft in ({}, PLAIN)]
        assert found[0].ids == found[1].ids
        assert [a.finish_reason for a in found] == ["context"] * 2
        assert room <= len(found[0].ids) <= room + 1
        check_counts(found[0])


def kept_guesses(calls: Calls) -> set[int]:
    """Ids that were guessed rightly."""
    kept = set()
    for ids, chosen in calls.named("append_choices"):
        pairs = zip(ids[1:], chosen, strict=False)
        kept |= {guess for guess, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)}
    return kept


@pytest.mark.parametrize("first", [40, 77, 300])
def test_a_stop_id_in_a_guess_that_holds(
    choosing: TinyModel, model: VLM, calls: Calls, first: int
) -> None:
    """What was guessed and run behind the end is no part of the answer nor of its counts."""
    prompt = [1, first]
    said = list(ask(model, prompt, max_tokens=150, ignore_eos=True).read().ids)
    longer = [*prompt, *said[:90]]  # so that the answer goes on with what was read
    calls.made.clear()
    whole = list(ask(model, longer, max_tokens=60, ignore_eos=True).read().ids)
    assert whole == said[90:150]
    stops = kept_guesses(calls)
    assert stops, "else nothing was shown"
    for stop in sorted(stops)[:6]:
        object.__setattr__(model.text_model, "stop_ids", frozenset({stop}))
        model._states.free.clear()
        answer = ask(model, longer, max_tokens=60).read()
        assert list(answer.ids) == whole[: whole.index(stop) + 1]
        assert (answer.finish_reason, answer.ids[-1]) == ("stop", stop)
        check_counts(answer)
        follow_up = [*longer, *answer.ids, 77, 78]
        found = list(ask(model, follow_up, **LONG).read().ids)
        assert found == by_torch(choosing, follow_up, found)


def test_stop_strings_cut_as_without_guesses(model: VLM) -> None:
    whole = model.generate(None, QUESTIONS[2], **LONG)
    kept = 0
    for start in range(0, len(whole.text) - 2, 9):
        stop = whole.text[start : start + 2]
        answers = [
            model.generate(None, QUESTIONS[2], stop=stop, **LONG, **draft)
            for draft in ({}, PLAIN)
        ]
        assert answers[0].finish_reason == "stop_string"
        assert answers[0].text == answers[1].text == whole.text[: whole.text.index(stop)]
        assert answers[0].ids == answers[1].ids
        check_counts(answers[0])
        kept += answers[0].timings.kept_guesses
    assert kept


# What is left behind.


def test_a_chat_goes_on_as_one_that_never_guessed(choosing: TinyModel, model: VLM) -> None:
    """Though what is left behind the filled rows is spoilt between its turns."""
    plain = VLM.load(choosing.path, threads=1, verify=False).chat()
    chat, guessed, kept = model.chat(), 0, 0
    for question, picture in (("What?", PICTURE), ("Why? What? Why?", None), ("What?", None)):
        found = chat.ask(question, picture, max_tokens=60)
        expected = plain.ask(question, picture, max_tokens=60, **PLAIN)
        assert (found.ids, found.text) == (expected.ids, expected.text)
        guessed += found.timings.guessed_tokens
        kept += found.timings.kept_guesses
        cache = chat._state.cache
        assert isinstance(cache, HostKvCache)
        for tensor in range(cache.shape.tensors):
            cache.new(tensor, cache.capacity - cache.length)[...] = 7.0
    assert guessed > kept > 0


@pytest.mark.parametrize("deltas", [1, 2, 9, 25])
def test_closing_the_stream_anywhere(model: VLM, deltas: int) -> None:
    whole = model.generate(None, QUESTIONS[2], **LONG, **PLAIN).ids
    with model.stream(None, QUESTIONS[2], **LONG) as stream:
        for _ in range(deltas):
            next(stream)
    answer = stream.answer
    assert answer.finish_reason == "interrupted"
    assert answer.ids == whole[: len(answer.ids)]
    check_counts(answer)
    assert model.generate(None, QUESTIONS[2], **LONG).ids == whole


@pytest.mark.parametrize("row", [0, -1], ids=["kept", "new"])
def test_a_nan_is_an_error_and_does_not_stay(model: VLM, calls: Calls, row: int) -> None:
    question = QUESTIONS[2]
    whole = model.generate(None, question, **LONG, **PLAIN).ids
    stream = model.stream(None, question, **LONG)
    while not calls.named("append_choices"):
        next(stream)
    state = stream._run._greedy._state  # type: ignore[union-attr]
    assert isinstance(state.cache, HostKvCache)
    state.cache.past(1)[row] = np.nan
    calls.made.clear()
    with pytest.raises(EngineError, match="not finite"):
        stream.read()
    assert len(calls.made) == 1, "at once"
    assert model.generate(None, question, **LONG).ids == whole


def test_a_nan_behind_a_guess_leaves_the_cache_as_it_was(decoder: OrtDecoder) -> None:
    state = DecoderState(decoder)
    prompt = PromptIds(np.array([1, 40, 41, 42], np.int32))
    first = int(state.prefill(prompt, NO_IMAGE).argmax())
    expected = state.decode_guess([first, 3, 4], NO_IMAGE)
    length = state.cache.length
    assert isinstance(state.cache, HostKvCache)
    state.cache.past(0)[1] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        state.decode_guess([expected[-1], 3, 4], NO_IMAGE)
    assert state.cache.length == length
    state.start_anew()
    assert int(state.prefill(prompt, NO_IMAGE).argmax()) == first
    assert state.decode_guess([first, 3, 4], NO_IMAGE) == expected


def test_an_interrupted_guess_keeps_what_is_true(
    model: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right behind the run, before the wrong rows are dropped."""
    whole = model.generate(None, QUESTIONS[2], **LONG, **PLAIN).ids
    decoder = decoder_of(model)
    original = decoder.append_choices

    def interrupt(*arguments: Any) -> list[int]:
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder, "append_choices", interrupt)
    stream = model.stream(None, QUESTIONS[2], **LONG)
    with pytest.raises(KeyboardInterrupt):
        stream.read()
    monkeypatch.undo()
    answer = stream.answer
    assert (answer.finish_reason, answer.ids) == ("interrupted", whole[: len(answer.ids)])
    assert model.generate(None, QUESTIONS[2], **LONG).ids == whole
