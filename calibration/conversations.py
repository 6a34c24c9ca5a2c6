"""Conversations in the form that LLaVA and MobileVLM are trained from: one JSON list.

    [{"id": "1", "image": "kitchen.jpg",
      "conversations": [{"from": "human", "value": "<image>\\nWhat is on the table?"},
                        {"from": "gpt", "value": "A kettle."}, ...]}, ...]

``image`` is relative to the file's folder. Every question is a sample with its answer and the
turns before it. As in the published training code, ``<image>`` is taken out of the first
question, which the prompt template puts it in front of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.prompt import IMAGE_MARK

from .sample import SAMPLES_FILE, Sample, read_text

SPEAKERS = ("human", "gpt")
"""Who speaks in turn."""

Turns = list[tuple[str, str]]


def read_conversations(path: Path) -> list[Sample]:
    """Every question of a conversation file, in its order.

    Raises:
        InputError: the file is missing, empty or no JSON list, or an entry is no conversation
            about one picture; the message has its number, from 1 on.
    """
    text = read_text(path)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON ({error}). Mend it; a file with one object a line must be "
            f"named .jsonl, as {SAMPLES_FILE}."
        ) from error
    if not isinstance(entries, list):
        raise InputError(
            f"{path} is no list of conversations: it holds one {type(entries).__name__}. "
            'Write [{"image": ..., "conversations": [...]}, ...].'
        )
    samples = [
        sample
        for number, entry in enumerate(entries, 1)
        for sample in _samples_of(entry, f"{path}, entry {number}", path.parent)
    ]
    if not samples:
        raise InputError(f"{path} holds no samples. Give a list with conversations in it.")
    return samples


def _samples_of(entry: object, place: str, folder: Path) -> list[Sample]:
    if not isinstance(entry, dict):
        raise InputError(f"{place} is not a JSON object. Mend or remove the entry.")
    if isinstance(entry.get("id"), (str, int)):
        place = f"{place} (id {entry['id']})"
    image = _image_of(entry, place, folder)
    turns = _turns_of(entry.get("conversations"), place)
    return [
        Sample(image, question, answer, history=tuple(turns[:earlier]))
        for earlier, (question, answer) in enumerate(turns)
    ]


def _image_of(entry: dict[str, Any], place: str, folder: Path) -> Path:
    if entry.get("image") is None:
        raise InputError(
            f"{place} has no image, and text alone does not show the vision encoder anything. "
            'Add "image", or remove the entry.'
        )
    if not isinstance(entry["image"], str):
        raise InputError(
            f'{place}: "image" must be a string, the file of one picture. Mend or remove the '
            "entry."
        )
    image = folder / entry["image"]
    if not image.is_file():
        raise InputError(f"{place}: the image {image} does not exist. Mend the entry.")
    return image


def _turns_of(messages: object, place: str) -> Turns:
    """Questions with their answers."""
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f'{place}: "conversations" must be a list of turns. Mend or remove the entry.'
        )
    values = [
        _message(message, SPEAKERS[index % 2], f"{place}, turn {index + 1}")
        for index, message in enumerate(messages)
    ]
    if len(values) % 2:
        raise InputError(
            f"{place} has {len(values)} turns, so its last question has no answer. Add the "
            "answer, or remove the question."
        )
    questions, answers = values[0::2], values[1::2]
    questions[0] = _without_mark(questions, place)
    return list(zip(questions, answers, strict=True))


def _message(message: object, speaker: str, place: str) -> str:
    known = isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("from", "value")
    )
    if not isinstance(message, dict) or not known:
        raise InputError(
            f'{place} is not {{"from": ..., "value": ...}} with two strings. Mend the entry.'
        )
    if message["from"] != speaker:
        raise InputError(
            f"{place} is from {message['from']!r}, but {speaker!r} must speak there: human "
            "and gpt take turns, and human begins. Mend or remove the entry."
        )
    return str(message["value"])


def _without_mark(questions: list[str], place: str) -> str:
    """The first question without its ``<image>``."""
    marks = [question.count(IMAGE_MARK) for question in questions]
    if marks[0] > 1 or any(marks[1:]):
        raise InputError(
            f"{place} holds {IMAGE_MARK} {sum(marks)} times or after the first question, but "
            "there is one image, shown at the start. Mend or remove the entry."
        )
    empty = [2 * index + 1 for index, question in enumerate(questions) if not question.strip()]
    if empty:
        raise InputError(f"{place}, turn {empty[0]} is empty. Mend or remove the entry.")
    return questions[0].replace(IMAGE_MARK, "").strip() if marks[0] else questions[0]
