"""Samples made ready for parity, and refused before any work where they cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mvlm_export.calibration.data import Sample
from mvlm_export.calibration.feeds import conversation_of, decoder_cases
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess_uint8
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.prompt import (
    Conversation,
    PromptIds,
    get_template,
    tokenize_prompt,
)
from mvlm_export.engines.tokenizer import LlamaTokenizer


@dataclass(frozen=True, eq=False)
class Case:
    """A sample made ready.

    Attributes:
        index: its place among the samples.
        conversation: the sample's question, behind its earlier turns.
        limit: most tokens of its answer, on PyTorch's side and in the runtime alike.
        truth: ids of the true answer, closed by a stop id and cut where the model's positions
            end; None where it is not known.
    """

    index: int
    sample: Sample
    conversation: Conversation
    prompt_ids: PromptIds
    limit: int
    truth: tuple[int, ...] | None = None

    @property
    def prompt(self) -> npt.NDArray[np.int32]:
        """int32 [S], image rows included."""
        return self.prompt_ids.ids

    def forced_ids(self, greedy: Sequence[int]) -> list[int]:
        """The answer to teacher-force: the true one, or else PyTorch's greedy one."""
        return list(greedy if self.truth is None else self.truth)

    @property
    def label(self) -> str:
        """Question and picture, for messages."""
        return f"{self.sample.prompt!r} on {self.sample.image.name}"


def prepare_cases(
    model: ModelSpec,
    tokenizer: LlamaTokenizer,
    samples: Sequence[Sample],
    max_tokens: int,
    max_positions: int,
) -> list[Case]:
    """Tokenize every question and read every picture once.

    The pixels are not kept: :func:`pixels_of` makes them again, one picture at a time.

    Args:
        max_tokens: longest answer; shorter where the prompt leaves less room.
        max_positions: longest sequence that both sides take.

    Raises:
        InputError: there is no sample, or one of them cannot be used; it is named.
    """
    if not samples:
        raise InputError("There is no sample to compare on. Give at least one.")
    return [
        _prepare(model, tokenizer, sample, index, max_tokens, max_positions)
        for index, sample in enumerate(samples)
    ]


def _prepare(
    model: ModelSpec,
    tokenizer: LlamaTokenizer,
    sample: Sample,
    index: int,
    max_tokens: int,
    max_positions: int,
) -> Case:
    place = f"The sample {sample.prompt!r} on {sample.image} cannot be used"
    try:
        asked = conversation_of(sample, get_template(model.template))
        counts = [model.image_tokens]
        prompt = tokenize_prompt(asked.render(), tokenizer, model.vocab_size, counts)
        pixels_of(sample, model)
    except InputError as error:
        raise InputError(f"{place}: {error} Mend or remove its line.") from error
    room = max_positions - len(prompt)
    if room < 1:
        raise InputError(
            f"{place}: its prompt takes {len(prompt)} positions, but the model has "
            f"{max_positions}, and at least one must be left for the answer. Shorten the "
            "question, remove the sample, or compile with a larger --max-length."
        )
    truth = _true_ids(model, tokenizer, sample, room)
    return Case(index, sample, asked, prompt, min(max_tokens, room), truth)


def _true_ids(
    model: ModelSpec, tokenizer: LlamaTokenizer, sample: Sample, room: int
) -> tuple[int, ...] | None:
    if sample.answer is None:
        return None
    (case,) = decoder_cases(model, tokenizer, [sample])
    return tuple(case.ids[case.answer_start :][:room].tolist())


def pixels_of(sample: Sample, model: ModelSpec) -> npt.NDArray[np.uint8]:
    """Read a sample's picture, resized and not normalised: uint8 [1, 3, S, S]."""
    config = ImageProcessorConfig.from_json(model.image_processor)
    return preprocess_uint8(sample.image, config)
