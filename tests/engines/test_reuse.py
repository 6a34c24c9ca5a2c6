"""A further question about the same picture runs the question alone, and says the same."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from mvlm_export.engines.vlm import VLM

from .conftest import TinyModel

RANDOM = np.random.default_rng(11)
PICTURES = [RANDOM.integers(0, 255, (40, 30 + i, 3), dtype=np.uint8) for i in range(3)]
QUESTIONS = ["What is on the table?", "How many people are there?", "What is this?"]


@pytest.fixture(params=["append", "prefix", "fixed"])
def model(request: pytest.FixtureRequest) -> TinyModel:
    fixtures = {"append": "tiny", "prefix": "tiny_prefix", "fixed": "tiny_fixed"}
    found: TinyModel = request.getfixturevalue(fixtures[request.param])
    return found


def open_vlm(model: TinyModel, **options: bool) -> VLM:
    return VLM.load(model.path, threads=1, verify=False, **options)


def test_answers_are_those_without_reuse(model: TinyModel, tiny: TinyModel) -> None:
    """Every order of questions and pictures, against a plain bundle that keeps nothing."""
    plain = open_vlm(tiny, reuse=False)
    vlm = open_vlm(model)
    expected = {}
    for p, q in ((p, q) for p in range(3) for q in range(2)):
        expected[p, q] = plain.generate(PICTURES[p], QUESTIONS[q], max_tokens=8).ids
    assert len(set(expected.values())) == 6
    for p, q in ((0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (2, 1), (2, 1), (0, 1)):
        answer = vlm.generate(PICTURES[p], QUESTIONS[q], max_tokens=8)
        assert answer.ids == expected[p, q]


def test_the_second_question_runs_itself_alone(model: TinyModel) -> None:
    vlm = open_vlm(model)
    prefix = vlm.new_state().cache.length
    first = vlm.generate(PICTURES[0], QUESTIONS[0], max_tokens=4).timings
    assert (first.images, first.images_reused) == (1, 0)
    assert first.cached_tokens == first.prefix_tokens == prefix
    second = vlm.generate(PICTURES[0], QUESTIONS[1], max_tokens=4).timings
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTIONS[1], 1))
    (_, image_end) = prompt.image_spans[0]
    assert second.images_reused == 1
    assert second.vision == second.projector == 0
    assert second.preprocess > 0
    assert second.cached_tokens >= image_end
    assert second.prefill_tokens == len(prompt) - second.cached_tokens
    assert second.prefix_tokens == prefix
    again = vlm.generate(PICTURES[0], QUESTIONS[1], max_tokens=4).timings
    assert again.prefill_tokens == 1


def test_another_picture_with_the_same_ids_reuses_no_row(model: TinyModel) -> None:
    vlm = open_vlm(model)
    prompt = vlm.tokenize(vlm.conversation().ask(QUESTIONS[0], 1))
    (image_start, _) = prompt.image_spans[0]
    for picture in (PICTURES[0], PICTURES[1], PICTURES[0]):
        timings = vlm.generate(picture, QUESTIONS[0], max_tokens=4).timings
        assert timings.cached_tokens <= image_start
    assert timings.images_reused == 1


def test_one_changed_pixel_is_another_picture(tiny: TinyModel) -> None:
    vlm = open_vlm(tiny)
    changed = PICTURES[0].copy()
    changed[20, 15] ^= 255
    vlm.generate(PICTURES[0], QUESTIONS[0], max_tokens=2)
    timings = vlm.generate(changed, QUESTIONS[0], max_tokens=2).timings
    assert timings.images_reused == 0
    assert timings.vision > 0


def test_nothing_is_kept_without_reuse(tiny: TinyModel) -> None:
    vlm = open_vlm(tiny, reuse=False)
    for _ in range(2):
        timings = vlm.generate(PICTURES[0], QUESTIONS[0], max_tokens=2).timings
        assert timings.images_reused == timings.cached_tokens == 0
        assert timings.vision > 0


def test_a_question_without_a_picture_between(model: TinyModel, tiny: TinyModel) -> None:
    """It overwrites the end of the prefix, and the picture's rows."""
    plain, vlm = open_vlm(tiny, reuse=False), open_vlm(model)
    for picture in (PICTURES[0], None, PICTURES[0], None, PICTURES[1]):
        found = vlm.generate(picture, QUESTIONS[0], max_tokens=8)
        assert found.ids == plain.generate(picture, QUESTIONS[0], max_tokens=8).ids


def test_several_pictures_are_compared_in_order(model: TinyModel, tiny: TinyModel) -> None:
    plain, vlm = open_vlm(tiny, reuse=False), open_vlm(model)
    calls = [(0, 1), (0, 2), (1, 0), (0, 2)]
    kept = []
    for pair in calls:
        pictures = [PICTURES[i] for i in pair]
        answer = vlm.generate(pictures, QUESTIONS[2], max_tokens=6)
        assert answer.ids == plain.generate(pictures, QUESTIONS[2], max_tokens=6).ids
        kept.append(answer.timings.cached_tokens)
    (first, _), (second, _) = vlm.tokenize(vlm.conversation().ask("?", 2)).image_spans
    assert first >= kept[0]
    assert kept[1] == second
    assert kept[2] == kept[3] == first


def test_streams_side_by_side(model: TinyModel, tiny: TinyModel) -> None:
    plain, vlm = open_vlm(tiny, reuse=False), open_vlm(model)
    vlm.generate(PICTURES[0], QUESTIONS[0], max_tokens=4)
    asked = [(0, 1), (0, 0), (1, 0)]
    expected = [plain.generate(PICTURES[p], QUESTIONS[q], max_tokens=10).ids for p, q in asked]
    streams = [vlm.stream(PICTURES[p], QUESTIONS[q], max_tokens=10) for p, q in asked]
    for _ in range(3):
        for stream in streams:
            next(stream)
    assert [stream.read().ids for stream in streams] == expected
    assert [vlm.generate(PICTURES[p], QUESTIONS[q], max_tokens=10).ids for p, q in asked] == (
        expected
    )


def test_threads_side_by_side(tiny_prefix: TinyModel) -> None:
    vlm = open_vlm(tiny_prefix)
    asked = [(p, q) for p in range(3) for q in range(2)]
    plain = open_vlm(tiny_prefix, reuse=False, use_prefix=False)
    expected = {
        (p, q): plain.generate(PICTURES[p], QUESTIONS[q], max_tokens=5).ids for p, q in asked
    }
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).permutation(len(asked)):
            p, q = asked[i]
            ids = vlm.generate(PICTURES[p], QUESTIONS[q], max_tokens=5).ids
            if ids != expected[p, q]:
                wrong.append((p, q, ids))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_chats_reuse_pictures_and_rows(model: TinyModel) -> None:
    vlm = open_vlm(model)
    vlm.generate(PICTURES[0], QUESTIONS[0], max_tokens=2)
    chat = vlm.chat()
    first = chat.ask(QUESTIONS[0], PICTURES[0], max_tokens=5)
    assert first.timings.images_reused == 1
    second = chat.ask(QUESTIONS[1], max_tokens=5)
    assert (second.timings.images, second.timings.images_reused) == (0, 0)
    t = first.timings
    assert second.timings.cached_tokens >= t.prefill_tokens + t.cached_tokens
    chat.reset()
    other = chat.ask(QUESTIONS[0], PICTURES[1], max_tokens=5)
    assert other.ids == vlm.chat().ask(QUESTIONS[0], PICTURES[1], max_tokens=5).ids
    chat.reset()
    assert chat.ask(QUESTIONS[0], PICTURES[0], max_tokens=5).ids == first.ids
    assert chat.ask(QUESTIONS[1], max_tokens=5).ids == second.ids
