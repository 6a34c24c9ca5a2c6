"""Conversations to text, and text with ``<image>`` marks to one sequence of ids.

The templates and the cutting at ``<image>`` are those of the published MobileVLM. An image's
rows stand in the sequence as ids from ``vocab_size`` on, which the decoder graph reads as rows
of ``image_embeds``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .tokenizer import LlamaTokenizer

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class PromptTemplate:
    """How the turns of a conversation are written down, in the order of the fields.

    Attributes:
        name: key in :data:`TEMPLATES`.
        system: what comes before the first turn.
        user_start: before each user message.
        image_mark: written in front of a message for each of its images.
        user_end: after each user message.
        assistant_start: where the model takes over.
        answer_start: between ``assistant_start`` and an answer given earlier.
        answer_end: after an answer given earlier; ``</s>`` is also what the model stops with.
    """

    name: str
    system: str
    user_start: str
    image_mark: str
    user_end: str
    assistant_start: str
    answer_start: str
    answer_end: str

    def constant_prefix(self) -> str:
        """The text in front of the first message: the same whatever is asked or shown."""
        return self.system + self.user_start


TEMPLATES = {
    template.name: template
    for template in (
        PromptTemplate(
            name="v1",
            system=(
                "A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's "
                "questions. "
            ),
            user_start="USER: ",
            image_mark=f"{IMAGE_MARK}\n",
            user_end=" ",
            assistant_start="ASSISTANT:",
            answer_start=" ",
            answer_end="</s>",
        ),
        PromptTemplate(
            name="plain",
            system="",
            user_start="",
            image_mark=IMAGE_MARK,
            user_end="",
            assistant_start="",
            answer_start="",
            answer_end="\n",
        ),
    )
}
"""``v1``: Vicuna v1, for chat. ``plain``: image and text alone, as in pre-training."""


def get_template(name: str) -> PromptTemplate:
    """A template by name.

    Raises:
        InputError: there is no template of that name.
    """
    if name not in TEMPLATES:
        raise InputError(
            f"There is no prompt template '{name}'; choose one of {', '.join(TEMPLATES)}."
        )
    return TEMPLATES[name]


@dataclass(frozen=True)
class Turn:
    """A user message with its image marks, and its answer once there is one."""

    message: str
    answer: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns so far; asking and answering give a new conversation and leave this one as it is.

    Attributes:
        template: how it is written down.
        turns: oldest first.
    """

    template: PromptTemplate = TEMPLATES["v1"]
    turns: tuple[Turn, ...] = ()

    def ask(self, text: str, images: int = 0) -> Conversation:
        """Add a user message.

        Args:
            text: the question; may say itself where its images stand by ``<image>``.
            images: how many images are given with this message; without ``<image>`` in the
                text, a mark for each is put in front of it.

        Raises:
            InputError: marks and images do not match, the message is empty, or the question
                before it has no answer yet.
        """
        if self.turns and self.turns[-1].answer is None:
            raise InputError(
                "The question before this one has no answer yet; add it with answer() first."
            )
        marks = text.count(IMAGE_MARK)
        if marks not in (0, images) or (images == 0 and marks):
            raise InputError(
                f"The message holds {IMAGE_MARK} {_times(marks)}, but {images} image(s) were "
                "given with it; give one image for each mark, or leave the marks out."
            )
        if not text and not images:
            raise InputError("The message is empty and has no image; ask something.")
        message = text if marks else self.template.image_mark * images + text
        return replace(self, turns=(*self.turns, Turn(message)))

    def answer(self, text: str) -> Conversation:
        """Add the answer to the last question; an ``<image>`` in it is defused by a space.

        Raises:
            InputError: no question is waiting for an answer.
        """
        if not self.turns or self.turns[-1].answer is not None:
            raise InputError("No question is waiting for an answer; ask() first.")
        plain = text.replace(IMAGE_MARK, f"{IMAGE_MARK[:-1]} {IMAGE_MARK[-1]}")
        return replace(self, turns=(*self.turns[:-1], replace(self.turns[-1], answer=plain)))

    @property
    def image_count(self) -> int:
        """Images over all turns."""
        return sum(turn.message.count(IMAGE_MARK) for turn in self.turns)

    def constant_prefix(self) -> str:
        """As :meth:`PromptTemplate.constant_prefix`."""
        return self.template.constant_prefix()

    def render(self) -> str:
        """The whole text; with an unanswered question it ends where the model takes over."""
        form = self.template
        text = form.system
        for turn in self.turns:
            text += form.user_start + turn.message + form.user_end + form.assistant_start
            if turn.answer:
                text += form.answer_start + turn.answer
            if turn.answer is not None:
                text += form.answer_end
        return text


@dataclass(frozen=True, eq=False)
class PromptIds:
    """A prompt as the decoder graph takes it.

    Attributes:
        ids: int32 [S]; ``vocab_size + i`` is row i of the embeddings of all images in order.
        image_spans: place in ``ids`` of each image, first and one past the last.
    """

    ids: npt.NDArray[np.int32]
    image_spans: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def shared_prefix(self, other: npt.NDArray[np.int32]) -> int:
        """How many leading ids equal those of ``other``: so many cache rows can be reused.

        Image rows count as equal by number alone; that they are of the same picture is for the
        caller to know.
        """
        length = min(len(self), int(other.shape[0]))
        differs = np.flatnonzero(self.ids[:length] != other[:length])
        return int(differs[0]) if differs.size else length


def tokenize_prompt(
    text: str,
    tokenizer: LlamaTokenizer,
    vocab_size: int,
    image_token_counts: Sequence[int] = (),
) -> PromptIds:
    """Ids of a rendered prompt.

    The text is cut at ``<image>``; each part is tokenised as a text of its own, and ``bos_id``
    stands at the very start alone.

    Args:
        text: what :meth:`Conversation.render` gives.
        tokenizer: of the model's folder.
        vocab_size: rows of the model's embedding table, config.json's ``vocab_size``.
        image_token_counts: rows of each image in order (144 each for the published models).

    Raises:
        InputError: the images do not match the marks, or a token lies outside ``vocab_size``.
    """
    parts = text.split(IMAGE_MARK)
    if len(parts) - 1 != len(image_token_counts):
        raise InputError(
            f"The prompt holds {IMAGE_MARK} {_times(len(parts) - 1)}, but "
            f"{len(image_token_counts)} image(s) were given; give one image for each mark."
        )
    if any(count < 1 for count in image_token_counts):
        raise InputError(
            f"The images have {list(image_token_counts)} rows; each needs one at least: check "
            "the projector's output."
        )
    pieces = [tokenizer.encode(parts[0], bos=tokenizer.add_bos)]
    pieces += [tokenizer.encode(part, bos=False) for part in parts[1:]]
    _check_vocabulary(pieces, tokenizer, vocab_size)
    bounds = np.cumsum([0, *image_token_counts]).tolist()
    ids = list(pieces[0])
    spans: list[tuple[int, int]] = []
    for (first, last), piece in zip(pairwise(bounds), pieces[1:], strict=True):
        spans.append((len(ids), len(ids) + last - first))
        ids += range(vocab_size + first, vocab_size + last)
        ids += piece
    return PromptIds(np.array(ids, dtype=np.int32), tuple(spans))


def tokenize_constant_prefix(
    template: PromptTemplate, tokenizer: LlamaTokenizer
) -> npt.NDArray[np.int32]:
    """int32 [P] ids of the constant prefix, as they stand in front of an image.

    A question without an image may be cut into other tokens at the end of the prefix:
    :meth:`PromptIds.shared_prefix` says how much of it a prompt really starts with.
    """
    ids = tokenizer.encode(template.constant_prefix(), bos=tokenizer.add_bos)
    return np.array(ids, dtype=np.int32)


def _check_vocabulary(
    pieces: Sequence[Sequence[int]], tokenizer: LlamaTokenizer, vocab_size: int
) -> None:
    highest = max((id_ for piece in pieces for id_ in piece), default=0)
    if highest >= vocab_size:
        raise InputError(
            f"The text holds {tokenizer.surface(highest)!r}, token {highest}, but the model "
            f"knows {vocab_size} tokens only and would read it as an image; the tokenizer "
            "files belong to another model, or the text must do without it."
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
