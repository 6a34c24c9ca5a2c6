"""Building processes and their packages, for tests."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from . import fake_tensorrt_10_3

FAKE_PACKAGE = """
from tests.engines.fake_tensorrt_10_3 import *
from tests.engines.fake_tensorrt_10_3 import __version__
"""


def children_of(pid: int) -> list[int]:
    """Processes whose parent a process is, by /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def worker() -> int:
    """The one building process of this one."""
    (pid,) = children_of(os.getpid())
    return pid


def wait_until(condition, seconds=20.0):
    """Whether something came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def offer_tensorrt_10_3(folder, monkeypatch):
    """Let this process and those it starts import the stand-in as ``tensorrt``."""
    (folder / "tensorrt.py").write_text(FAKE_PACKAGE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt_10_3)
