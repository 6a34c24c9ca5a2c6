"""Prompts in pieces that an engine's profile admits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .errors import EngineError
from .session import IdArray


@dataclass(frozen=True)
class PromptChunk:
    """Ids that are run together.

    Attributes:
        ids: int32 [S]; an id >= vocab_size names a row of the image rows of this chunk.
        first_row: where its image rows begin in those of the prompt.
        row_count: image rows it names, from the first to the last; 0 if it names none.
    """

    ids: IdArray
    first_row: int
    row_count: int


def split_prompt(
    ids: IdArray, vocab_size: int, most_ids: int, most_rows: int
) -> Iterator[PromptChunk]:
    """Cut ``ids`` into as few chunks, from the left, as the limits allow.

    Args:
        ids: int32 [S]; those >= vocab_size name image rows.
        most_ids: ids of a chunk at most, 1 or more.
        most_rows: image rows of a chunk at most, 1 or more.
    """
    start = 0
    while start < len(ids):
        window = ids[start : start + most_ids]
        rows = window - vocab_size
        # First and last row named by the ids up to here; -1 as the last means none.
        last = np.maximum.accumulate(np.where(rows >= 0, rows, -1))
        first = np.minimum.accumulate(np.where(rows >= 0, rows, np.iinfo(np.int32).max))
        fits = (last < 0) | (last - first < most_rows)
        count = len(window) if fits.all() else int(np.argmin(fits))
        if last[count - 1] < 0:
            yield PromptChunk(window[:count], 0, 0)
        else:
            begin, end = int(first[count - 1]), int(last[count - 1]) + 1
            moved = np.where(rows >= 0, window - begin, window)[:count]
            yield PromptChunk(moved, begin, end - begin)
        start += count


def check_ids(ids: IdArray, vocab_size: int, image_rows: int) -> None:
    """Check what the GPU would not: it reads some other memory for an id out of range.

    Raises:
        EngineError: there are no ids, or one is neither of the vocabulary nor an image row.
    """
    if not len(ids):
        raise EngineError("The decoder was given no ids; run one at least.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size + image_rows:
        raise EngineError(
            f"The id {low if low < 0 else high} names no row: the vocabulary has {vocab_size} "
            f"and {image_rows} image rows follow it. Give the rows of every picture that the "
            "prompt names."
        )
