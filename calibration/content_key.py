"""What samples are, apart from where they lie: digests of their words and pictures.

A cache of activations, or of weights that were rounded by them, is keyed by ``samples_key``:
it holds for a copied or renamed folder, and ends when a picture or a word changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from mvlm_export.engines.errors import InputError

from .sample import Sample


def samples_key(samples: Iterable[Sample]) -> str:
    """sha256, in hexadecimal, of prompts, answers, histories and image bytes.

    The order counts. File names and kinds do not.

    Raises:
        InputError: a picture cannot be read.
    """
    whole = hashlib.sha256()
    pictures: dict[Path, bytes] = {}
    for sample in samples:
        if sample.image not in pictures:
            pictures[sample.image] = image_digest(sample.image)
        whole.update(hashlib.sha256(words_of(sample)).digest() + pictures[sample.image])
    return whole.hexdigest()


def words_of(sample: Sample) -> bytes:
    """History, prompt and answer in one string of bytes that no other words give."""
    return json.dumps([sample.history, sample.prompt, sample.answer]).encode("ascii")


def image_digest(image: Path) -> bytes:
    """sha256 of a picture's file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return hashlib.sha256(image.read_bytes()).digest()
    except OSError as error:
        raise InputError(
            f"The image {image} cannot be read ({error}). Mend or remove its sample."
        ) from error
