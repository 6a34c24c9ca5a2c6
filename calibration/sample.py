"""One question about one picture, and the reading of text files that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvlm_export.engines.errors import InputError

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One question about one picture.

    Attributes:
        image: the picture's file.
        prompt: the question.
        answer: what the model should say, where that is known.
        kind: of question; subsets are spread over kinds, and figures given for each.
        history: earlier questions and answers, oldest first; the picture came with the first.
    """

    image: Path
    prompt: str
    answer: str | None = None
    kind: str | None = None
    history: tuple[tuple[str, str], ...] = ()


def read_text(path: Path) -> str:
    """A whole UTF-8 file, with or without a byte order mark.

    Raises:
        InputError: it is missing, a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Samples cannot be read from {path} ({error}). Give a JSONL file, or a folder "
            f'with {SAMPLES_FILE}: one {{"image": ..., "prompt": ..., "answer": ...}} a line; '
            "or a .json file with a list of conversations."
        ) from error
