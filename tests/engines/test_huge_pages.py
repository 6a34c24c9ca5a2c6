"""Memory that is wholly filled goes to large pages, nothing else, and its values stay."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mvlm_export.engines import huge_pages
from mvlm_export.engines.huge_pages import (
    HUGE_PAGE,
    anonymous_spans,
    current_spans,
    use_huge_pages,
)

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 8 * HUGE_PAGE

MAPS = """\
55d0c1a00000-55d0c1a21000 r--p 00000000 fe:00 1311 /usr/bin/python3.11
55d0c1c00000-55d0c1c10000 rw-p 00200000 fe:00 1311 /usr/bin/python3.11
55d0c2b00000-55d0c2d00000 rw-p 00000000 00:00 0                          [heap]
7f0c10000000-7f0c10200000 rw-p 00000000 00:00 0
7f0c10200000-7f0c14000000 ---p 00000000 00:00 0
7f0c14000000-7f0c14400000 rw-s 00000000 00:01 2054 /dev/zero (deleted)
7f0c14400000-7f0c14500000 rw-s 00000000 00:01 7
7f0c15000000-7f0c15400000 r--p 00000000 00:00 0
7f0c16000000-7f0c16400000 rw-p 00000000 fe:00 99 /models/decoder.data
7f0c17000000-7f0c17400000 rw-p 00000000 00:00 0                          [anon:named]
7f0c20000000-7f0c20a00000 rw-p 00000000 00:00 0
7ffe3a000000-7ffe3a021000 rw-p 00000000 00:00 0                          [stack]
7ffe3a1f0000-7ffe3a1f4000 r--p 00000000 00:00 0                          [vvar]
"""
"""Lines as Linux writes them."""


def refusal() -> str | None:
    """Why this system does not move memory when asked, if it does not."""
    if not sys.platform.startswith("linux"):
        return "not Linux"
    version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    if version < (6, 1):
        return f"MADV_COLLAPSE came with Linux 6.1, this is {os.uname().release}"
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        return f"{ENABLED} allows none"
    return None


moves = pytest.mark.skipif(refusal() is not None, reason=str(refusal()))


class Memory:
    """Anonymous memory, of which no page is there until it is touched."""

    def __init__(self) -> None:
        self.before = current_spans()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.bytes = np.frombuffer(mmap.mmap(-1, SIZE, flags=flags), np.uint8)
        # Small pages first: elsewhere than "madvise" the system may give large ones itself.
        first = self.bytes.ctypes.data // mmap.PAGESIZE
        self.entries = slice(8 * first, 8 * (first + SIZE // mmap.PAGESIZE))

    def pages_there(self) -> int:
        """Pages that hold memory of this process."""
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            pagemap.seek(self.entries.start)
            entries = pagemap.read(self.entries.stop - self.entries.start)
        own = np.uint64(1 << 63 | 1 << 56)
        return int(np.count_nonzero(np.frombuffer(entries, np.uint64) & own == own))


@pytest.fixture
def memory() -> Memory:
    if not sys.platform.startswith("linux"):
        pytest.skip("not Linux")
    if not ENABLED.exists() or "[always]" in ENABLED.read_text():
        pytest.skip("the system gives large pages, whole ones, without being asked")
    return Memory()


def test_spans_are_those_of_private_memory_without_a_file_or_a_name() -> None:
    assert list(anonymous_spans(MAPS.splitlines(keepends=True))) == [
        (0x7F0C10000000, 0x7F0C10200000),
        (0x7F0C20000000, 0x7F0C20A00000),
    ]
    assert list(anonymous_spans([])) == []


def test_current_spans_have_what_was_mapped_since(memory: Memory) -> None:
    place = memory.bytes.ctypes.data
    assert any(first <= place < last for first, last in current_spans() - memory.before)
    assert not any(first <= place and place + SIZE <= last for first, last in memory.before)


@moves
def test_filled_memory_moves_and_keeps_its_values(memory: Memory) -> None:
    values = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    memory.bytes[:] = values
    moved = use_huge_pages(memory.before)
    assert moved >= SIZE - HUGE_PAGE
    assert moved % HUGE_PAGE == 0
    np.testing.assert_array_equal(memory.bytes, values)
    memory.bytes[::4096] += 1
    values[::4096] += 1
    np.testing.assert_array_equal(memory.bytes, values)


def leave_empty(memory: Memory) -> None:
    pass


def fill_every_other_part(memory: Memory) -> None:
    """Half of each large page, wherever the first one begins."""
    memory.bytes.reshape(-1, HUGE_PAGE // 2)[::2] = 1


def read_the_other_parts(memory: Memory) -> None:
    """The kernel's page of zeros stands for what was read and never written."""
    fill_every_other_part(memory)
    assert memory.bytes[:: mmap.PAGESIZE].sum() > 0


@pytest.mark.parametrize("touch", [leave_empty, fill_every_other_part, read_the_other_parts])
def test_what_is_not_wholly_filled_gets_no_memory(
    memory: Memory, touch: Callable[[Memory], None]
) -> None:
    touch(memory)
    there = memory.pages_there()
    assert there == (0 if touch is leave_empty else SIZE // mmap.PAGESIZE // 2)
    use_huge_pages(memory.before)
    assert memory.pages_there() == there


@moves
def test_of_a_span_the_filled_part_moves_alone(memory: Memory) -> None:
    filled = 5 * HUGE_PAGE
    memory.bytes[:filled] = 3
    there = memory.pages_there()
    assert use_huge_pages(memory.before) >= filled - HUGE_PAGE
    assert memory.pages_there() == there
    assert (memory.bytes[:filled] == 3).all()


def test_elsewhere_than_on_linux_nothing_is_done(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.bytes[:] = 1
    monkeypatch.setattr(sys, "platform", "win32")
    assert current_spans() == frozenset()
    assert use_huge_pages(memory.before) == 0


def test_a_pagemap_that_cannot_be_read(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.bytes[:] = 1
    monkeypatch.setattr(huge_pages, "_PAGEMAP", tmp_path / "pagemap")
    assert use_huge_pages(memory.before) == 0
    (tmp_path / "pagemap").touch()
    assert use_huge_pages(memory.before) == 0
    assert (memory.bytes == 1).all()


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="no sysconf")
@pytest.mark.parametrize(("more", "whole"), [(0, 0), (3, 0), (3, 1)])
def test_a_pagemap_that_ends_early_tells_of_whole_pages_alone(
    more: int, whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pagemap"
    path.write_bytes(b"\xff" * 8 * (whole * HUGE_PAGE // mmap.PAGESIZE + more))
    monkeypatch.setattr(huge_pages, "_PAGEMAP", path)
    expected = [(0, whole * HUGE_PAGE)] if whole else []
    assert list(huge_pages._filled((0, SIZE))) == expected


def test_without_proc_nothing_is_done(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.bytes[:] = 1
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "maps")
    assert current_spans() == frozenset()
    assert use_huge_pages(memory.before) == 0
