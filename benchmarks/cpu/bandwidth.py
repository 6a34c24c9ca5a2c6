"""The most bytes a second that threads of this machine read from memory.

Each thread sums its own part of one large array, again and again; the best pass of the best of
several ways to sum counts. Summing is what reads with least besides: numpy's reductions and
BLAS's dot product use wide loads and let go of Python's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

BYTES = 1 << 30
PASSES = 4

Reader = Callable[["np.ndarray[Any, Any]"], Any]

READERS: Mapping[str, Reader] = {
    "maximum": lambda part: part.view(np.int64).max(),
    "or": lambda part: np.bitwise_or.reduce(part.view(np.int64)),
    "dot": lambda part: np.dot(part, part),
}


def read_bandwidth(threads: int, size: int = BYTES, passes: int = PASSES) -> dict[str, float]:
    """GB/s of each way to read, the best of ``passes``."""
    array = np.ones(size // 4, np.float32)
    parts = np.array_split(array, threads)
    found = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, reader in READERS.items():
            seconds = min(_pass(pool, reader, parts) for _ in range(passes))
            found[name] = array.nbytes / seconds / 1e9
    return found


def _pass(pool: ThreadPoolExecutor, reader: Reader, parts: list[Any]) -> float:
    started = time.perf_counter()
    list(pool.map(reader, parts))
    return time.perf_counter() - started


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(read_bandwidth(int(sys.argv[1]))))
