"""Image and question samples from a user's files or objects, and small subsets of them.

A folder with ``samples.jsonl``, or any such file, holds one JSON object a line:

    {"image": "kitchen.jpg", "prompt": "What is on the table?", "answer": "A kettle."}

``image`` is relative to the file's folder; ``answer`` and ``kind`` may be missing. A ``.json``
file holds a list of conversations (:mod:`.conversations`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from os import PathLike
from pathlib import Path

from mvlm_export.engines.errors import InputError

from .content_key import image_digest, words_of
from .conversations import read_conversations
from .sample import SAMPLES_FILE, Sample, read_text

__all__ = ["SAMPLES_FILE", "Sample", "as_samples", "choose_samples", "read_samples"]


def read_samples(source: Path, limit: int | None = None) -> list[Sample]:
    """Read samples from a file or a folder.

    Args:
        source: a ``.json`` file with conversations; any other file, with a JSON object a line;
            a folder with ``samples.jsonl``, or else with one ``.json`` file.
        limit: keep the first so many.

    Raises:
        InputError: the file is missing, empty or ambiguous, or a line or entry is not a
            sample; the message has its number.
    """
    path = _file_in(source) if source.is_dir() else source
    is_list = path.suffix.lower() == ".json"
    samples = read_conversations(path) if is_list else _read_lines(path)
    return samples if limit is None else samples[:limit]


def as_samples(samples: Iterable[Sample]) -> list[Sample]:
    """A user's own samples, checked as those of a file are.

    Raises:
        InputError: there is none, or one is no sample or its image does not exist; the message
            has its number, from 1 on.
    """
    found = [_checked(sample, f"Sample {n}") for n, sample in enumerate(samples, 1)]
    if not found:
        raise InputError("There are no samples. Give at least one.")
    return found


def choose_samples(samples: Sequence[Sample], count: int, seed: int = 0) -> list[Sample]:
    """A subset that depends on what the samples are, not on where or in what order they lie.

    Kinds take turns, and within a kind sha256 of the words and the seed decides; a smaller
    subset is the beginning of a larger one. Pictures are read only where words are the same.

    Args:
        count: how many; all of them where there are fewer.

    Raises:
        InputError: ``count`` is below 1, or a picture cannot be read.
    """
    if count < 1:
        raise InputError(f"{count} samples were asked for. Ask for at least one.")
    kinds: dict[str, list[Sample]] = {}
    for sample in samples:
        kinds.setdefault(sample.kind or "", []).append(sample)
    by_kind = [(kind, _first_by_rank(group, count, seed)) for kind, group in kinds.items()]
    by_kind.sort(key=lambda item: (_rank(words_of(item[1][0]), seed), item[0]))
    turns = zip_longest(*(group for _, group in by_kind))
    return [sample for turn in turns for sample in turn if sample is not None][:count]


def _first_by_rank(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """The ``count`` lowest ranks of words, in order; equal words are parted by pictures."""
    ranked = sorted(
        ((_rank(words_of(sample), seed), sample) for sample in samples),
        key=lambda item: item[0],
    )
    found: list[Sample] = []
    for _, same in groupby(ranked, key=lambda item: item[0]):
        if len(found) >= count:
            break
        equals = [sample for _, sample in same]
        if len(equals) > 1:
            equals.sort(key=lambda sample: _rank(image_digest(sample.image), seed))
        found += equals
    return found[:count]


def _rank(content: bytes, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n".encode() + content).digest()


def _file_in(folder: Path) -> Path:
    """``samples.jsonl``, else the one ``.json`` file."""
    lines = folder / SAMPLES_FILE
    found = sorted(folder.glob("*.json"))
    if lines.exists() or not found:
        return lines
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise InputError(
            f"{folder} has no {SAMPLES_FILE} and {len(found)} .json files ({names}"
            f"{', ...' if len(found) > 4 else ''}). Name the one with the conversations."
        )
    return found[0]


def _read_lines(path: Path) -> list[Sample]:
    # Not splitlines(): JSON strings may hold U+2028 and U+0085, which it cuts at.
    lines = read_text(path).split("\n")
    samples = [
        _parse(line, number, path) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not samples:
        raise InputError(f"{path} holds no samples. Write one JSON object a line.")
    return samples


def _parse(line: str, number: int, path: Path) -> Sample:
    place = f"{path}, line {number}"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}). Mend or remove the line.") from error
    if not isinstance(data, dict):
        raise InputError(f"{place} is not a JSON object. Mend or remove the line.")
    for key, needed in (("image", True), ("prompt", True), ("answer", False), ("kind", False)):
        value = data.get(key)
        if not isinstance(value, str) and (needed or value is not None):
            raise InputError(f'{place}: "{key}" must be a string. Mend the line.')
    image = path.parent / data["image"]
    if not image.is_file():
        raise InputError(f"{place}: the image {image} does not exist. Mend the line.")
    return Sample(image, data["prompt"], data.get("answer"), data.get("kind"))


def _checked(sample: object, place: str) -> Sample:
    if not isinstance(sample, Sample):
        raise InputError(
            f"{place} is a {type(sample).__name__}. Give Sample(image, prompt, answer) "
            "objects."
        )
    for name, value in (("answer", sample.answer), ("kind", sample.kind)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place}: {name} must be a string or None. Mend the sample.")
    if not isinstance(sample.prompt, str):
        raise InputError(f"{place}: prompt must be a string. Mend the sample.")
    turns = sample.history
    if not isinstance(turns, (tuple, list)) or not all(_is_turn(turn) for turn in turns):
        raise InputError(
            f"{place}: history must hold pairs of strings, question and answer. Mend the "
            "sample."
        )
    if not isinstance(sample.image, (str, PathLike)) or not Path(sample.image).is_file():
        raise InputError(f"{place}: the image {sample.image} does not exist. Mend the sample.")
    history = tuple((question, answer) for question, answer in turns)
    return replace(sample, image=Path(sample.image), history=history)


def _is_turn(turn: object) -> bool:
    return (
        isinstance(turn, (tuple, list))
        and len(turn) == 2
        and all(isinstance(text, str) for text in turn)
    )
