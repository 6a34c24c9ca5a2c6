"""Memory of this process that is taken page by page, as it is written."""

from __future__ import annotations

import errno
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import EngineError


def zeros_on_demand(shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
    """An array of zeros of which only the touched pages take memory.

    numpy asks Linux for pages of 2 MB behind a large array (madvise of its allocator), so
    that one value in each 2 MB makes all of it resident: in a cache [1, H_kv, capacity,
    head_dim] the first row of every head does. Here pages stay as small as the system has
    them. Elsewhere than on Linux this is ``numpy.zeros``.

    Raises:
        EngineError: the system gives no such memory.
    """
    if sys.platform != "linux":
        return np.zeros(shape, dtype)
    count = math.prod(shape)
    size = max(count * np.dtype(dtype).itemsize, 1)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise EngineError(
            f"{size / 1e6:.0f} MB of memory cannot be had ({error}). Close other programs, or "
            "compile with a smaller --max-length."
        ) from error
    _keep_pages_small(pages)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def _keep_pages_small(pages: mmap.mmap) -> None:
    """Undo ``transparent_hugepage=always``; without huge pages there is nothing to undo."""
    advice = getattr(mmap, "MADV_NOHUGEPAGE", None)
    if advice is None:
        return
    try:
        pages.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
