"""Answers of the real graphs against the PyTorch modules run without a cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import mvlm_export.engines
from mvlm_export.engines.errors import BundleError, InputError
from mvlm_export.engines.generation import AnswerStream
from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess
from mvlm_export.engines.kv_cache import HostKvCache
from mvlm_export.engines.sampling import SamplingParams
from mvlm_export.engines.timings import PhaseClock
from mvlm_export.engines.vlm import VLM

from .conftest import TinyModel

QUESTION = "What is on the table?"
RANDOM = np.random.default_rng(11)
PICTURES = [RANDOM.integers(0, 255, (40, 30 + i, 3), dtype=np.uint8) for i in range(3)]


def embed(tiny: TinyModel, pictures: list[np.ndarray]):
    config = ImageProcessorConfig(32)
    return tiny.embed(np.concatenate([preprocess(picture, config) for picture in pictures]))


# The real graphs against PyTorch.


@pytest.mark.parametrize("count", [0, 1, 3])
def test_greedy_ids_are_those_of_pytorch(tiny: TinyModel, vlm: VLM, count: int) -> None:
    pictures = PICTURES[:count]
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION, count))
    embeds = embed(tiny, pictures) if count else None
    expected = tiny.greedy(prompt.ids, 12, embeds)
    answer = vlm.generate(pictures or None, QUESTION, max_tokens=12)
    assert list(answer.ids) == expected
    assert len(set(expected)) > 6
    if count:
        np.testing.assert_allclose(vlm.embed_images(pictures), embeds, atol=1e-4)
        assert answer.ids != vlm.generate(None, QUESTION, max_tokens=12).ids


def test_marks_place_the_pictures(tiny: TinyModel, vlm: VLM) -> None:
    question = "Is <image> before <image> or after?"
    prompt = vlm.tokenize(vlm.conversation().ask(question, 2))
    (first, _), (second, _) = prompt.image_spans
    assert prompt.ids[first] == 512
    assert prompt.ids[second] == 512 + 4
    expected = tiny.greedy(prompt.ids, 8, embed(tiny, PICTURES[:2]))
    assert list(vlm.generate(PICTURES[:2], question, max_tokens=8).ids) == expected
    swapped = vlm.generate(PICTURES[1::-1], question, max_tokens=8)
    assert list(swapped.ids) != expected


def test_a_conversation_that_is_given_is_answered_as_a_chat(vlm: VLM) -> None:
    chat, given = vlm.chat(), vlm.conversation()
    turns = ((QUESTION, PICTURES[:1]), ("Why?", []), ("And here?", PICTURES[1:]))
    shown: list[np.ndarray] = []
    for question, pictures in turns:
        given, shown = given.ask(question, len(pictures)), shown + pictures
        expected = chat.ask(question, pictures, max_tokens=6)
        found = vlm.stream_conversation(given, shown, max_tokens=6).read()
        assert found.ids == expected.ids
        given = given.answer(expected.text)
    with pytest.raises(InputError, match=r"has 3 image\(s\), but 2 were given"):
        vlm.stream_conversation(given.ask("Well?"), shown[:2])


def test_cache_rows_are_those_of_the_whole_run(tiny: TinyModel, vlm: VLM) -> None:
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION, 1))
    answer = vlm.generate(PICTURES[0], QUESTION, max_tokens=6)
    state = vlm._states.free[-1]
    sequence = np.concatenate([prompt.ids, answer.ids[:-1]]).astype(np.int32)
    np.testing.assert_array_equal(state.ids, sequence)
    _, *rows = tiny.full_run(sequence, embed(tiny, PICTURES[:1]))
    assert isinstance(state.cache, HostKvCache)
    for tensor, expected in enumerate(rows):
        np.testing.assert_allclose(state.cache.past(tensor), expected, atol=1e-4)


def test_half_precision_answers(tiny_half: TinyModel) -> None:
    vlm = VLM.load(tiny_half.path, threads=1)
    answer = vlm.generate(PICTURES[:2], QUESTION, max_tokens=4, ignore_eos=True)
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION, 2))
    expected = tiny_half.greedy(prompt.ids, 1, embed(tiny_half, PICTURES[:2]))
    assert list(answer.ids[:1]) == expected
    assert len(answer.ids) == 4
    chat = vlm.chat()
    chat.ask("Look.", PICTURES[0], max_tokens=2)
    assert chat.ask("And now?", PICTURES[1], max_tokens=2).timings.cached_tokens > 0


def test_stream_and_generate_say_the_same(vlm: VLM) -> None:
    stream = vlm.stream(PICTURES[0], QUESTION, max_tokens=40)
    deltas = list(stream)
    answer = vlm.generate(PICTURES[0], QUESTION, max_tokens=40)
    assert len(deltas) > 5
    assert "".join(deltas) == stream.answer.text == answer.text
    assert answer.text == vlm.text_model.tokenizer.decode(answer.ids)
    assert stream.answer.ids == answer.ids


def test_streams_side_by_side_do_not_mix(vlm: VLM) -> None:
    alone = [vlm.generate(p, QUESTION, max_tokens=15).ids for p in PICTURES[:2]]
    streams = [vlm.stream(p, QUESTION, max_tokens=15) for p in PICTURES[:2]]
    for _ in range(4):
        for stream in streams:
            next(stream)
    assert [stream.read().ids for stream in streams] == alone


def test_seeds_reproduce(vlm: VLM) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=12, temperature=1.5, top_k=50, seed=seed)
        return vlm.generate(PICTURES[0], QUESTION, params).ids

    assert draw(3) == draw(3) != draw(4)


def test_penalty_counts_the_prompt_but_no_image_row(vlm: VLM) -> None:
    plain = vlm.generate(PICTURES[0], QUESTION, max_tokens=30, ignore_eos=True)
    other = vlm.generate(
        PICTURES[0], QUESTION, max_tokens=30, ignore_eos=True, repetition_penalty=5.0
    )
    assert len(set(other.ids)) > len(set(plain.ids))


def test_timings_cover_every_phase(tiny: TinyModel) -> None:
    vlm = VLM.load(tiny.path, threads=1, reuse=False)
    wall, reading = PhaseClock(), 0.0
    stream = vlm.stream(PICTURES[:2], QUESTION, max_tokens=5, ignore_eos=True)
    for _ in stream:
        clock = PhaseClock()
        while clock.elapsed() < 0.02:
            pass
        reading += clock.elapsed()
    whole = wall.elapsed()
    timings = stream.answer.timings
    data = timings.to_json()
    nothing = {"cached_tokens", "prefix_tokens", "images_reused"}
    nothing |= {"guessed_tokens", "kept_guesses"}
    assert {name for name in data if data[name] == 0} == nothing
    assert min(data.values()) >= 0
    parts = [timings.preprocess, timings.vision, timings.projector, timings.prefill]
    assert sum(parts) <= timings.time_to_first_token
    assert timings.time_to_first_token + timings.decode <= timings.total
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTION, 2))
    assert (timings.prefill_tokens, timings.decode_tokens) == (len(prompt), 4)
    assert reading >= 0.02
    assert timings.total <= whole - reading
    assert data["decode_tokens_per_second"] == pytest.approx(4 / timings.decode)
    assert stream.answer.to_json()["timings"] == data


# Several turns.


def test_second_turn_sees_the_whole_conversation(tiny: TinyModel, vlm: VLM) -> None:
    chat = vlm.chat()
    first = chat.ask("What is this?", PICTURES[0], max_tokens=7)
    conversation = vlm.conversation().ask("What is this?", 1).answer(first.text)
    conversation = conversation.ask("And in <image> here?", 1)
    whole = vlm.tokenize(conversation)
    second = chat.ask("And in <image> here?", PICTURES[1], max_tokens=9)

    embeds = embed(tiny, PICTURES[:2])
    expected = tiny.greedy(whole.ids, 9, embeds)
    assert list(second.ids) == expected
    sequence = np.concatenate([whole.ids, expected[:-1]]).astype(np.int32)
    np.testing.assert_array_equal(chat._state.ids, sequence)
    _, *rows = tiny.full_run(sequence, embeds)
    for tensor, rows_of_all in enumerate(rows):
        np.testing.assert_allclose(chat._state.cache.past(tensor), rows_of_all, atol=1e-4)

    timings = second.timings
    assert timings.cached_tokens + timings.prefill_tokens == len(whole)
    assert timings.cached_tokens >= first.timings.prefill_tokens
    third = chat.ask("Why?", max_tokens=3)
    assert third.timings.cached_tokens >= len(whole)
    assert third.timings.vision == 0
    assert len(chat.conversation.turns) == 3


def test_chats_and_single_questions_do_not_mix(vlm: VLM) -> None:
    def talk(between: Callable[[], object]) -> list[tuple[int, ...]]:
        chat, ids = vlm.chat(), []
        for question in ("Hello", "How many?", "Why?"):
            ids.append(chat.ask(question, max_tokens=6).ids)
            between()
        return ids

    alone = talk(lambda: None)
    other = vlm.chat()
    assert talk(lambda: vlm.generate(PICTURES[0], QUESTION, max_tokens=3)) == alone
    assert talk(lambda: other.ask("Look", PICTURES[1], max_tokens=3)) == alone


@pytest.mark.parametrize("reuse", [True, False])
def test_reset_forgets(tiny: TinyModel, reuse: bool) -> None:
    chat = VLM.load(tiny.path, threads=1, reuse=reuse).chat()
    first = chat.ask("What is this?", PICTURES[0], max_tokens=5)
    chat.ask("And this?", PICTURES[1], max_tokens=5)
    chat.reset()
    assert chat.conversation.turns == ()
    again = chat.ask("What is this?", PICTURES[0], max_tokens=5)
    assert again.ids == first.ids
    run = 1 if reuse else first.timings.prefill_tokens
    assert again.timings.prefill_tokens == run
    assert again.timings.images_reused == reuse


def test_a_failed_turn_leaves_no_picture_behind(vlm: VLM) -> None:
    """Rows of a picture that was dropped have the ids of the next one's."""
    chat, fresh = vlm.chat(), vlm.chat()
    for session in (chat, fresh):
        session.ask("Hello", max_tokens=4)
    stream = chat.stream("See", PICTURES[0], max_tokens=4)
    prefill = chat._state.prefill

    def interrupted(*arguments: object) -> None:
        prefill(*arguments)
        raise KeyboardInterrupt

    chat._state.prefill = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    del chat._state.prefill
    assert len(chat.conversation.turns) == 1
    with pytest.raises(InputError, match="There is no answer yet"):
        _ = stream.answer
    expected = fresh.ask("See", PICTURES[1], max_tokens=6)
    assert chat.ask("See", PICTURES[1], max_tokens=6).ids == expected.ids


def test_the_last_position_can_be_used(tiny: TinyModel, vlm: VLM) -> None:
    """The real graph at its very end, against PyTorch."""
    words = "table " * 135
    ids = vlm.tokenize(vlm.conversation().ask(words)).ids
    assert 400 < len(ids) < 512
    answer = vlm.generate(None, words, max_tokens=1000, ignore_eos=True)
    assert (len(answer.ids), answer.finish_reason) == (512 - len(ids), "context")
    sequence = np.concatenate([ids, answer.ids[:-1]]).astype(np.int32)
    logits, *_ = tiny.full_run(sequence)
    assert answer.ids[-1] == logits[-1].argmax()


# Errors and the public surface.


def test_errors_of_the_caller(vlm: VLM) -> None:
    with pytest.raises(InputError, match="no sampling setting max_token"):
        vlm.generate(None, QUESTION, max_token=3)
    with pytest.raises(InputError, match="top_p is 2"):
        vlm.stream(None, QUESTION, top_p=2)
    with pytest.raises(InputError, match="The message is empty"):
        vlm.generate(None, "")
    with pytest.raises(InputError, match="2 times"):
        vlm.generate(PICTURES[0], "<image> and <image>?")
    with pytest.raises(InputError, match="no-such-file"):
        vlm.generate("no-such-file.jpg", QUESTION)
    assert vlm.generate(None, QUESTION, max_tokens=1).finish_reason == "length"


def test_loading_errors(tiny: TinyModel, tmp_path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        VLM.load(tmp_path / "none")
    with pytest.raises(InputError, match="no backend 'tpu'"):
        VLM.load(tiny.path, backend="tpu")
    with pytest.raises(InputError, match="no ONNX Runtime provider 'npu'"):
        VLM.load(tiny.path, provider="npu")


def test_public_names() -> None:
    assert mvlm_export.engines.VLM is VLM
    assert mvlm_export.engines.SamplingParams is SamplingParams
    assert mvlm_export.engines.AnswerStream is AnswerStream
    for name in mvlm_export.engines.__all__:
        assert getattr(mvlm_export.engines, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = mvlm_export.engines.Nothing
