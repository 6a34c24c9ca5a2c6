"""Samples as the inputs of the graphs: pixels, and answers teacher-forced.

The decoder sees what it sees when it answers rightly: the prompt, with the picture's rows, and
the true answer behind it. So activations are those of both prefill and decode, and one run
takes the place of a run for each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.image_processor import (
    ImageProcessorConfig,
    encoder_input,
    preprocess_uint8,
)
from mvlm_export.engines.kv_cache import cache_names
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.prompt import (
    Conversation,
    PromptTemplate,
    get_template,
    tokenize_prompt,
)
from mvlm_export.engines.tokenizer import LlamaTokenizer

from .sample import Sample

Feed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class DecoderCase:
    """A sample as one sequence.

    Attributes:
        ids: int32 [S]; ``vocab_size + i`` is row i of the picture.
        answer_start: where the answer begins in ``ids``; S where there is none.
    """

    ids: npt.NDArray[np.int32]
    answer_start: int
    sample: Sample


def pixel_feeds(
    model: ModelSpec, samples: Iterable[Sample], dtype: str = "uint8"
) -> Iterator[Feed]:
    """``pixel_values`` [1, 3, S, S] of each sample, one picture in memory at a time.

    Args:
        dtype: of the encoder's input: ``uint8`` gives raw pixels, any other gives normalised
            ones in float32.

    Raises:
        InputError: a picture cannot be used; its sample is named.
    """
    config = ImageProcessorConfig.from_json(model.image_processor)
    for sample in samples:
        try:
            pixels = preprocess_uint8(sample.image, config)
        except InputError as error:
            raise _unusable(sample, error) from error
        yield {"pixel_values": encoder_input(pixels, config, dtype)}


def decoder_cases(
    model: ModelSpec, tokenizer: LlamaTokenizer, samples: Iterable[Sample]
) -> list[DecoderCase]:
    """Prompt and answer of each sample, cut off at the model's ``max_positions``.

    Raises:
        InputError: a sample cannot be tokenized for this model; it is named.
    """
    template = get_template(model.template)
    return [_case(model, tokenizer, template, sample) for sample in samples]


def conversation_of(sample: Sample, template: PromptTemplate) -> Conversation:
    """The sample's turns up to its question, the picture in front of the first.

    Raises:
        InputError: a question is empty or has ``<image>`` in a wrong place.
    """
    conversation = Conversation(template)
    images = 1
    for question, answer in sample.history:
        conversation = conversation.ask(question, images).answer(answer)
        images = 0
    return conversation.ask(sample.prompt, images)


def append_feeds(
    model: ModelSpec, ids: npt.NDArray[np.int32], image_embeds: npt.NDArray[np.float32]
) -> Feed:
    """Inputs of the float32 decoder, append form, for a whole sequence on an empty cache.

    Args:
        ids: [S], S >= 1.
        image_embeds: [I, D] of the projector, I >= 1.

    Raises:
        InputError: the rows are of another width, or ``ids`` name rows that are not there.
    """
    rows = int(ids.max(initial=0)) + 1 - model.vocab_size
    shape = image_embeds.shape
    if len(shape) != 2 or shape[1] != model.hidden_size or shape[0] < max(rows, 1):
        raise InputError(
            f"image_embeds are {list(shape)}, but the ids need [{max(rows, 1)} or more, "
            f"{model.hidden_size}]. Give the projector's rows of the same model and picture."
        )
    past = np.zeros((0, model.num_key_value_heads, model.head_dim), np.float32)
    return {
        "input_ids": np.ascontiguousarray(ids, np.int32),
        "image_embeds": np.ascontiguousarray(image_embeds, np.float32),
        **dict.fromkeys(cache_names("past_key_values", model.num_layers), past),
    }


def sample_warnings(samples: Sequence[Sample]) -> list[str]:
    """Sentences on what makes samples poor ones to calibrate by; none for good ones."""
    warnings = []
    if len(samples) == 1:
        warnings.append(
            "There is one sample to calibrate by: ranges will fit one picture and question. "
            "Give some dozens like those that the model will see."
        )
    if samples and all(sample.answer is None for sample in samples):
        warnings.append(
            "No sample has an answer: activations are seen for prompts alone, not for the "
            'tokens of answers. Add "answer" to them.'
        )
    return warnings


def _case(
    model: ModelSpec, tokenizer: LlamaTokenizer, template: PromptTemplate, sample: Sample
) -> DecoderCase:
    try:
        text = conversation_of(sample, template).render()
        prompt = tokenize_prompt(text, tokenizer, model.vocab_size, [model.image_tokens]).ids
        answer = _answer_ids(model, tokenizer, sample.answer)
    except InputError as error:
        raise _unusable(sample, error) from error
    ids = np.concatenate([prompt, answer])[: model.max_positions]
    return DecoderCase(ids, min(len(prompt), len(ids)), sample)


def _answer_ids(
    model: ModelSpec, tokenizer: LlamaTokenizer, answer: str | None
) -> npt.NDArray[np.int32]:
    """int32 [A], closed by a stop id; [0] without an answer."""
    if answer is None:
        return np.zeros(0, np.int32)
    stops = model.stop_ids
    stop = tokenizer.eos_id if tokenizer.eos_id in stops else stops[0]
    ids = tokenizer.encode(answer, bos=False)
    if max(ids, default=0) >= model.vocab_size:
        raise InputError(
            f"The answer holds token {max(ids)}, but the model knows {model.vocab_size} "
            "tokens only and would read it as an image; the tokenizer files belong to another "
            "model."
        )
    return np.array([*ids, stop], np.int32)


def _unusable(sample: Sample, error: InputError) -> InputError:
    return InputError(
        f"The sample {sample.prompt!r} on {sample.image} cannot be used: {error} Mend or "
        "remove it."
    )
