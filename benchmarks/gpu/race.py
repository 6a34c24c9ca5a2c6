"""Contestants that answer in turn, so that all of them meet the same machine.

Each is a process of its own (``contestant.py``): one that crashes ends nobody else's race. All
are opened and warmed up one after the other, then answer round by round, each round beginning
with another one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recorder import AttemptError, Recorder, end, tail

Answers = list[dict[str, Any]]

OPENING_SHARE = 0.7
"""Of the time that is left, what one contestant may take to open: others must race too."""


@dataclass
class Contestant:
    """A process that answers.

    Attributes:
        name: in tables.
        command: that starts it.
        log: gets its stderr.
        ready: what it said of itself when it was warm.
        answers: of the rounds so far.
    """

    name: str
    command: Sequence[str]
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)
    answers: Answers = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None

    def open(self, limit: float) -> None:
        """Start it and wait until it is warm.

        Raises:
            AttemptError: it cannot, or takes longer than ``limit`` seconds.
        """
        if limit <= 0:
            raise AttemptError("not started: the step's time was used up")
        with self.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.ready = self._read("ready", limit)

    def answer(self, limit: float) -> None:
        """One more answer.

        Raises:
            AttemptError: it failed, crashed, or takes longer than ``limit`` seconds.
        """
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write("answer\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said last tells why
        self.answers.append(self._read("answer", limit))

    def close(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def _read(self, wanted: str, limit: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        message = json.loads(line) if line else {}
        if wanted in message:
            found: dict[str, Any] = message[wanted]
            return found
        code = None if line else process.wait()
        self.close()
        if late.is_set():
            raise AttemptError(f"ended after {limit:.0f} s without a result\n{self._said()}")
        if "error" in message:
            raise AttemptError(f"{message['error']}\n{self._said(8)}".strip())
        raise AttemptError(f"crashed with exit code {code}\n{self._said()}")

    def _said(self, lines: int = 30) -> str:
        return tail(self.log.read_text(encoding="utf-8", errors="replace"), lines)


def open_contestant(
    contestant: Contestant, recorder: Recorder, device_memory: Callable[[], int | None]
) -> bool:
    """Open one; a failure is recorded.

    Args:
        device_memory: bytes of the device that are in use; None where that is not known.

    Returns:
        Whether it is ready.
    """
    before = device_memory()
    limit = OPENING_SHARE * recorder.budget.left
    recorder.attempt(
        f"open {contestant.name}", lambda: contestant.open(limit), contestant.command
    )
    after = device_memory()
    if contestant.ready and before is not None and after is not None:
        contestant.ready["device_bytes"] = after - before
    return bool(contestant.ready)


def race(contestants: Sequence[Contestant], runs: int, recorder: Recorder) -> dict[str, Any]:
    """Let those that are open answer ``runs`` times in turn, or until time runs short.

    Returns:
        By name: ``ready``, ``runs`` and the medians of the answers' figures.
    """
    running = [contestant for contestant in contestants if contestant.ready]
    longest = 0.0
    for number in range(runs):
        if number and recorder.budget.left < 1.5 * longest:
            recorder.note("stopped_early", f"after {number} of {runs} rounds: time ran short")
            break
        started = time.monotonic()
        turn = number % len(running) if running else 0
        for contestant in [*running[turn:], *running[:turn]]:
            if not _answer(contestant, recorder):
                running.remove(contestant)
        longest = max(longest, time.monotonic() - started)
    return {c.name: summarise(c) for c in contestants if c.answers}


def _answer(contestant: Contestant, recorder: Recorder) -> bool:
    try:
        contestant.answer(recorder.budget.left)
    except AttemptError as error:
        message = f"{error}"

        def fail() -> None:
            raise AttemptError(message)

        recorder.attempt(f"answer of {contestant.name}", fail)
        return False
    return True


def summarise(contestant: Contestant) -> dict[str, Any]:
    """Medians over a contestant's answers, and all of its totals."""
    answers = contestant.answers

    def median(read: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(read(answer) for answer in answers)

    phases = answers[0]["seconds"]
    return {
        **contestant.ready,
        "runs": len(answers),
        "seconds": {name: median(lambda a, n=name: a["seconds"][n]) for name in phases},
        "all_totals": [answer["seconds"]["total"] for answer in answers],
        "decode_tokens_per_second": median(lambda a: a["decode_tokens_per_second"]),
        "tokens_per_second": median(lambda a: a["tokens_per_second"]),
        "same_every_run": all(answer["ids"] == answers[0]["ids"] for answer in answers),
        "ids": answers[0]["ids"],
    }
