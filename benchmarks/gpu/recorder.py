"""What was tried, how long it took, and what exactly it said when it failed.

A step's record is a JSON file, written anew after each attempt, so that nothing known is lost
when the step is cut off.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

TAIL = 40
"""Lines of a failed command's output that are kept."""


class AttemptError(Exception):
    """Something that was tried failed; the message is what it said."""


@dataclass(frozen=True)
class Attempt:
    """One thing that was tried.

    Attributes:
        what: it was, in words.
        seconds: it took.
        error: what it said, exactly; None if it did not fail.
        command: that was run; None where no process was.
    """

    what: str
    seconds: float
    error: str | None
    command: tuple[str, ...] | None = None


class Budget:
    """Seconds that a step may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; 0 where none are."""
        return max(self._end - time.monotonic(), 0.0)


class Recorder:
    """The record of one step.

    Args:
        path: of the JSON file; an older record there is replaced.
        facts: what stands at its head: the machine, versions, date.
        budget: of the whole step.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], budget: Budget) -> None:
        self.path, self.budget = path, budget
        self.attempts: list[Attempt] = []
        self.values: dict[str, Any] = {}
        self._facts = dict(facts)
        self.write()

    def attempt(
        self,
        what: str,
        function: Callable[[], T],
        command: Sequence[str] | None = None,
    ) -> T | None:
        """Call a function; a failure is recorded and answered by None."""
        started = time.monotonic()
        result, error = None, None
        try:
            result = function()
        except AttemptError as failure:
            error = str(failure)
        except Exception as failure:  # noqa: BLE001 - any failure is a finding, not an end
            error = f"{type(failure).__name__}: {failure}"
        seconds = round(time.monotonic() - started, 2)
        line = None if command is None else tuple(command)
        self.attempts.append(Attempt(what, seconds, error, line))
        self.write()
        print(f"{what}: {seconds:.1f} s" + ("" if error is None else f", FAILED: {error}"))
        return result

    def run(self, what: str, command: Sequence[str], output: Path | None = None) -> bool:
        """Run a command within the step's budget.

        Args:
            output: gets its stdout.

        Returns:
            Whether it ended with 0.
        """
        done = self.attempt(what, lambda: run_command(command, self.budget.left), command)
        if done is not None and output is not None:
            output.write_text(done, encoding="utf-8")
        return done is not None

    def note(self, name: str, value: object) -> None:
        """Keep a figure or finding."""
        self.values[name] = value
        self.write()

    def to_json(self) -> dict[str, Any]:
        """The whole record."""
        attempts = [asdict(attempt) for attempt in self.attempts]
        return {**self._facts, "attempts": attempts, **self.values}

    def write(self) -> None:
        """Put the record in place, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}")
        partial.write_text(json.dumps(self.to_json(), indent=2), encoding="utf-8")
        partial.replace(self.path)


def run_command(command: Sequence[str], limit: float) -> str:
    """A command's stdout.

    Raises:
        AttemptError: it ended with another code than 0 (with the end of what it said), took
            longer than ``limit`` seconds, or cannot be started.
    """
    if limit <= 0:
        raise AttemptError("not started: the step's time was used up")
    try:
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise AttemptError(f"cannot be started: {error}") from error
    try:
        output, said = (
            text.decode(errors="replace") for text in process.communicate(None, limit)
        )
    except subprocess.TimeoutExpired as late:
        said = tail(end(process)[1].decode(errors="replace"))
        raise AttemptError(f"ended after {limit:.0f} s without a result\n{said}") from late
    except BaseException:
        end(process)
        raise
    if process.returncode:
        raise AttemptError(f"exit code {process.returncode}\n{tail(said) or tail(output)}")
    return output


def end(process: subprocess.Popen[Any]) -> tuple[Any, Any]:
    """Kill a process that leads a session, and all that it started; the rest of its output."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def tail(text: str, lines: int = TAIL) -> str:
    """The end of a text."""
    return "\n".join(text.strip().splitlines()[-lines:])
