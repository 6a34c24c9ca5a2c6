"""Held to the nano model's real files, and to its frozen golden logits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.calibration.feeds import (
    append_feeds,
    conversation_of,
    decoder_cases,
    pixel_feeds,
    sample_warnings,
)
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess
from mvlm_export.engines.manifest import graph_tensors
from mvlm_export.engines.prompt import get_template, tokenize_prompt
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.assemble import image_processor, model_spec
from mvlm_export.exporter.config import read_config
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import default_samples, nano_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples" / "nano"
GOLDEN_BOUND = 5e-4
"""As in ``tests/exporter/test_nano.py``."""


@pytest.fixture(scope="module")
def model():
    config = read_config(nano_checkpoint())
    processor = image_processor(nano_checkpoint(), config)
    return model_spec("nano", config, processor, "v1")


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_folder(nano_checkpoint())


@pytest.fixture(scope="module", params=["assets", "examples"])
def samples(request):
    folders = {"assets": default_samples(), "examples": EXAMPLES / "images"}
    return read_samples(folders[request.param])


def test_raw_pixels_of_every_sample(model, samples):
    found = [feed["pixel_values"] for feed in pixel_feeds(model, samples)]
    assert {(pixels.shape, pixels.dtype.name) for pixels in found} == {
        ((1, 3, 64, 64), "uint8")
    }
    with Image.open(samples[0].image) as picture:
        shown = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(found[0][0], shown)


def test_normalised_pixels(model, samples):
    config = ImageProcessorConfig.from_json(model.image_processor)
    (feed,) = pixel_feeds(model, samples[:1], "float32")
    assert np.array_equal(feed["pixel_values"], preprocess(samples[0].image, config))


def test_pictures_are_read_one_by_one(model, samples, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    feeds = pixel_feeds(model, [samples[0], Sample(tmp_path / "bad.png", "what?")])
    assert next(feeds)["pixel_values"].any()
    with pytest.raises(InputError, match=r"'what\?' on .*bad\.png cannot be used"):
        next(feeds)


def test_ids_are_those_of_the_whole_conversation(model, tokenizer, samples):
    """A chat that was answered so is written down with the same ids."""
    for sample, case in zip(samples, decoder_cases(model, tokenizer, samples), strict=True):
        chat = conversation_of(sample, get_template("v1")).answer(sample.answer)
        whole = tokenize_prompt(chat.render(), tokenizer, model.vocab_size, [16])
        assert np.array_equal(case.ids, whole.ids)
        assert case.ids.dtype == np.int32
        assert tokenizer.decode(case.ids[case.answer_start :]) == sample.answer
        assert case.ids[-1] == tokenizer.eos_id
        assert case.sample is sample
        rows = case.ids[case.ids >= model.vocab_size] - model.vocab_size
        assert rows.tolist() == list(range(model.image_tokens))


def test_earlier_turns_stand_in_front(model, tokenizer, samples):
    first = samples[0]
    later = replace(first, prompt="why?", history=((first.prompt, first.answer),))
    before, after = decoder_cases(model, tokenizer, [first, later])
    assert np.array_equal(after.ids[: len(before.ids)], before.ids)
    assert np.count_nonzero(after.ids >= model.vocab_size) == model.image_tokens
    text = tokenizer.decode(after.ids[len(before.ids) : after.answer_start])
    assert text == "USER: why? ASSISTANT:"


def test_a_sample_without_an_answer_is_its_prompt(model, tokenizer, samples):
    asked, bare, empty = decoder_cases(
        model,
        tokenizer,
        [samples[0], replace(samples[0], answer=None), replace(samples[0], answer="")],
    )
    assert bare.answer_start == len(bare.ids) == asked.answer_start
    assert np.array_equal(bare.ids, asked.ids[: asked.answer_start])
    assert empty.ids[empty.answer_start :].tolist() == [tokenizer.eos_id]


def test_a_stop_id_of_the_model_ends_answers(model, tokenizer, samples):
    other = replace(model, stop_ids=(7, 9))
    (case,) = decoder_cases(other, tokenizer, samples[:1])
    assert case.ids[-1] == 7


def test_long_samples_are_cut(model, tokenizer, samples):
    (whole,) = decoder_cases(model, tokenizer, samples[:1])
    for length in (len(whole.ids) - 1, whole.answer_start - 3):
        short = replace(model, max_positions=length)
        (case,) = decoder_cases(short, tokenizer, samples[:1])
        assert np.array_equal(case.ids, whole.ids[:length])
        assert case.answer_start == min(whole.answer_start, length)


def test_samples_that_cannot_be_tokenized_are_named(model, tokenizer, samples):
    bad = replace(samples[0], prompt="<image> or <image>?")
    with pytest.raises(InputError, match=r"<image> or <image>\?' on .* cannot be used"):
        decoder_cases(model, tokenizer, [samples[0], bad])
    small = replace(model, vocab_size=int(max(tokenizer.encode("ASSISTANT:", bos=True))) + 1)
    far = next(
        letter
        for letter in "abcdefghijklmnopqrstuvwxyzé"
        if max(tokenizer.encode(letter, bos=False)) >= small.vocab_size
    )
    with pytest.raises(InputError, match=r"cannot be used: The .* knows"):
        decoder_cases(small, tokenizer, [replace(samples[0], prompt="", answer=far)])


def test_feeds_give_the_golden_logits(model, tokenizer, tmp_path):
    reference = ReferenceModel.open(nano_checkpoint())
    with np.load(EXAMPLES / "golden.npz") as golden:
        pixels, questions, answers = (
            golden[name][:3] for name in ("pixels", "questions", "answers")
        )
        starts, ids, logits = (golden[name] for name in ("starts", "answer_ids", "logits"))
    scenes = []
    for number, picture in enumerate(pixels):
        path = tmp_path / f"{number}.png"
        Image.fromarray(picture).save(path)
        scenes.append(Sample(path, str(questions[number]), str(answers[number])))
    cases = decoder_cases(model, tokenizer, scenes)
    for number, (case, values) in enumerate(
        zip(cases, pixel_feeds(model, scenes, "float32"), strict=True)
    ):
        rows = slice(starts[number], starts[number + 1])
        assert np.array_equal(case.ids[case.answer_start :], ids[rows])
        features = reference.image_features(values["pixel_values"])
        feed = append_feeds(model, case.ids, reference.image_embeds(features)[0])
        assert list(feed) == graph_tensors("decoder", model.num_layers)[0]
        with torch.inference_mode():
            tensors = [torch.from_numpy(value) for value in feed.values()]
            found = reference.decoder(tensors[0], tensors[1], tensors[2:])[0].numpy()
        predicted = found[case.answer_start - 1 : -1]
        assert np.abs(predicted - logits[rows]).max() < GOLDEN_BOUND


def test_pasts_are_empty(model):
    feed = append_feeds(model, np.array([1, 5], np.int32), np.zeros((16, 256), np.float32))
    assert feed["past_key_values.3.value"].shape == (0, 4, 64)
    assert feed["past_key_values.0.key"].dtype == np.float32
    assert len(feed) == 2 + 2 * 4


@pytest.mark.parametrize(
    ("shape", "ids"),
    [((16, 255), [1]), ((1, 16, 256), [1]), ((0, 256), [1]), ((15, 256), [1, 512 + 15])],
)
def test_image_rows_must_fit(model, shape, ids):
    with pytest.raises(InputError, match="image_embeds are"):
        append_feeds(model, np.array(ids, np.int32), np.zeros(shape, np.float32))


def test_poor_samples_are_warned_of(samples):
    bare = [replace(sample, answer=None) for sample in samples]
    assert sample_warnings(samples) == []
    assert sample_warnings([*bare[:1], *samples]) == []
    (few,) = sample_warnings(samples[:1])
    (mute,) = sample_warnings(bare)
    assert few.startswith("There is one sample")
    assert mute.startswith("No sample has an answer")
    assert sample_warnings(bare[:1]) == [few, mute]
    assert sample_warnings([]) == []
