"""Give a loaded model's weights pages of 2 MiB.

A decode step reads every weight once. With pages of 4 KiB that is a miss of the address cache
every 4096 bytes, and the CPU's prefetchers stop at each page. Linux gives large pages without
being asked where ``/sys/kernel/mm/transparent_hugepage/enabled`` says ``always``; most systems
say ``madvise``, and ONNX Runtime does not ask. So we do, for what it has allocated: private
anonymous memory that is wholly filled already, so that no memory is added by it.
``docs/performance.md`` has what that gives. See madvise(2): MADV_COLLAPSE, Linux 6.1.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

HUGE_PAGE = 2 << 20
"""Bytes; of x86-64, and of aarch64 with pages of 4 KiB."""

_MADV_COLLAPSE = 25
_OWN = np.uint64(1 << 63 | 1 << 56)
"""Of a page's entry in ``/proc/self/pagemap``: in memory, and mapped by this process alone."""
_MAPS, _PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")

Span = tuple[int, int]
"""First address and the one behind the last."""


def anonymous_spans(maps: Iterable[str]) -> Iterator[Span]:
    """Private writable memory without a file, from the lines of ``/proc/self/maps``."""
    for line in maps:
        fields = line.split()
        if len(fields) == 5 and fields[1].startswith("rw-p"):
            first, last = fields[0].split("-")
            yield int(first, 16), int(last, 16)


def current_spans() -> frozenset[Span]:
    """This process's; none where the system does not say."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    try:
        with _MAPS.open() as lines:
            return frozenset(anonymous_spans(lines))
    except OSError:  # /proc is not mounted
        return frozenset()


def use_huge_pages(before: frozenset[Span]) -> int:
    """Put memory that was allocated since ``before`` on large pages.

    Args:
        before: ``current_spans()`` of then.

    Returns:
        Bytes moved; 0 where the kernel does not do it, which costs speed alone.
    """
    moved = 0
    for span in current_spans() - before:
        for first, last in _filled(span):
            if _collapse(first, last):
                moved += last - first
    return moved


def _filled(span: Span) -> Iterator[Span]:
    """The parts of a span, in whole large pages, of which every page is in memory.

    A page that was read but never written is the kernel's own page of zeros, and one that a
    forked process shares is not ours alone: a large page instead would add memory.
    """
    first = -(-span[0] // HUGE_PAGE) * HUGE_PAGE
    count = (span[1] - first) // HUGE_PAGE
    if count < 1:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with _PAGEMAP.open("rb", buffering=0) as pagemap:
            pagemap.seek(first // page * 8)
            entries = pagemap.read(count * HUGE_PAGE // page * 8)
    except OSError:  # not readable for this user
        return
    small = HUGE_PAGE // page
    count = len(entries) // 8 // small  # none where the system gives less than was asked for
    pages = np.frombuffer(entries[: count * small * 8], np.uint64).reshape(count, small)
    whole = np.all(pages & _OWN == _OWN, axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], whole, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield first + start * HUGE_PAGE, first + stop * HUGE_PAGE


def _collapse(first: int, last: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
    return bool(libc.madvise(address, length, _MADV_COLLAPSE) == 0)
