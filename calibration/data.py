"""Image and question samples: a folder with ``samples.jsonl``, one JSON object a line.

    {"image": "kitchen.jpg", "prompt": "What is on the table?", "answer": "A kettle."}

``image`` is relative to the file's folder; ``answer`` and ``kind`` may be missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mvlm_export.engines.errors import InputError

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One question about one picture."""

    image: Path
    prompt: str
    answer: str | None = None
    kind: str | None = None


def read_samples(source: Path, limit: int | None = None) -> list[Sample]:
    """Read a JSONL file, or the ``samples.jsonl`` of a folder.

    Raises:
        InputError: the file is missing, or a line is not a sample; the message has its number.
    """
    path = source / SAMPLES_FILE if source.is_dir() else source
    try:
        # Not splitlines(): JSON strings may hold U+2028 and U+0085, which it cuts at.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Samples cannot be read from {path} ({error}). Give a JSONL file, or a folder "
            f'with {SAMPLES_FILE}: one {{"image": ..., "prompt": ..., "answer": ...}} a line.'
        ) from error
    samples = [
        _parse(line, number, path) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not samples:
        raise InputError(f"{path} holds no samples. Write one JSON object a line.")
    return samples if limit is None else samples[:limit]


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
