"""What every worker does: take one engine's description, load it, answer when asked.

A worker is a process of its own, in the environment of its engine. It reads JSON, one object
a line, from its input and writes one a line to its output; what libraries print goes to its
error stream. This file needs Python and numpy alone, as it runs in every environment.

    {"worker": ...}                     -> {"load": seconds, "versions": {...}, ...}
    {"do": "answer", "tokens": 256}     -> {"encode": s, "prefill": s, "decode": s, ...}
    {"do": "outputs", "file": "a.npz"}  -> {}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = 200
"""Rows of the prompt."""

POSITIONS = 2048
"""Rows that every cache has room for."""

IMAGE = 336
"""Width and height of the picture."""


class Worker:
    """One engine; a subclass overrides what its ``sees`` and ``speaks`` promise.

    Attributes:
        sees: it encodes pictures; ``encode`` alone, or ``encode`` and ``project``.
        projects: ``project`` is a step of its own; else ``encode`` gives image rows.
        speaks: it has a decoder.
    """

    sees = False
    projects = True
    speaks = False

    def __init__(self, options: Mapping[str, Any], threads: int) -> None:
        self.options = options
        self.threads = threads

    def load(self) -> None:
        """Open everything; the time it takes is the load time."""

    def facts(self) -> dict[str, Any]:
        """Versions, ``weights_read`` and ``kv_row_bytes`` of a decode step."""
        return {}

    def encode(self) -> None:
        """The picture through the vision encoder."""
        raise self._lacking()

    def project(self) -> None:
        """Its features through the projector."""
        raise self._lacking()

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        """An empty cache, then the prompt in one call; the likeliest next id."""
        raise self._lacking()

    def step(self, token: int) -> int:
        """One token more; the likeliest next id."""
        raise self._lacking()

    def _lacking(self) -> TypeError:
        name = type(self).__name__
        return TypeError(f"{name} was asked for a phase that ``sees`` and ``speaks`` exclude.")

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        """``image_rows`` of the picture, ``logits`` of the prompt's last row, where known."""
        return {}

    def whole_answer(self, tokens: int) -> float | None:
        """Seconds of the engine's own question-to-answer path, where it has one."""
        return None


def picture() -> np.ndarray[Any, Any]:
    """The picture that all engines see, uint8 [IMAGE, IMAGE, 3]."""
    return np.random.default_rng(0).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)


def prompt(vocab_size: int) -> np.ndarray[Any, Any]:
    """The prompt that all engines read, int64 [PROMPT]."""
    return np.random.default_rng(1).integers(3, vocab_size, PROMPT)


def answer(worker: Worker, tokens: int) -> dict[str, float]:
    """The picture, the prompt and ``tokens`` greedy tokens, the first of them by the prefill.

    Returns:
        Seconds of each phase and of all (``total``); ``tokens``, and ``steps`` of the decoder.
    """
    taken: dict[str, float] = {}
    started = last = time.perf_counter()

    def mark(phase: str) -> None:
        nonlocal last
        now = time.perf_counter()
        taken[phase], last = now - last, now

    if worker.sees:
        worker.encode()
        mark("encode")
        if worker.projects:
            worker.project()
            mark("project")
    if worker.speaks:
        token = worker.prefill(prompt(worker.options["vocab_size"]))
        mark("prefill")
        for _ in range(tokens - 1):
            token = worker.step(token)
        mark("decode")
        taken |= {"tokens": tokens, "steps": tokens - 1}
    taken["total"] = time.perf_counter() - started
    return taken


def peak_rss() -> int:
    """Most bytes of memory this process has held (VmHWM: mapped files that were read too)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no VmHWM, so peak memory cannot be read.")


def serve(kind: type[Worker]) -> None:
    """Read requests and answer them until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What C libraries print must not end up among the replies.

    def reply(content: Mapping[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    spec = json.loads(sys.stdin.readline())
    worker = kind(spec["options"], spec["threads"])
    started = time.perf_counter()
    worker.load()
    reply({"load": time.perf_counter() - started, **worker.facts()})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "answer":
            taken: dict[str, Any] = dict(answer(worker, request["tokens"]))
            reply({**taken, "peak_rss": peak_rss()})
        elif request["do"] == "whole":
            reply({"whole": worker.whole_answer(request["tokens"]), "peak_rss": peak_rss()})
        elif request["do"] == "outputs":
            np.savez(request["file"], **worker.outputs())  # type: ignore[arg-type]
            reply({})
        else:
            raise ValueError(f"There is no request {request['do']!r}.")
