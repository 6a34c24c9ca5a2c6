"""What the commands print: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

TITLE_WIDTH = 40
LABEL_WIDTH = 30
PIPED_WIDTH = 110
SECONDS_PER_LINE = 5.0


def human_bytes(count: float) -> str:
    """1234567 -> ``1.2 MB`` (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_json(data: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; numbers should come formatted."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(width=width).print(table)


def print_line(text: str) -> None:
    """Plain text on stdout, never wrapped or coloured, so that it can be copied."""
    sys.stdout.write(text + "\n")


class StageProgress:
    """A listener with a bar for each stage; plain lines where stderr is no terminal.

    Use as a context manager, so that the terminal is left clean on errors and Ctrl-C.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[label]}", table_column=Column(ratio=1, no_wrap=True)),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._tenth = 0
        self._printed = time.monotonic()

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish_task()
        if self._console.is_terminal:
            self._progress.stop()

    def _finish_task(self) -> None:
        if self._task is not None:
            task = self._progress.tasks[self._progress.task_ids.index(self._task)]
            self._progress.update(self._task, total=task.total or 1, completed=task.total or 1)
            self._progress.update(self._task, label="")
            self._progress.stop_task(self._task)

    def stage(self, title: str) -> None:
        self._tenth, self._printed = 0, time.monotonic()
        if not self._console.is_terminal:
            sys.stderr.write(f"- {title}\n")
            return
        self._finish_task()
        self._task = self._progress.add_task(title.ljust(TITLE_WIDTH), total=None, label="")

    def advance(self, done: int, total: int, label: str) -> None:
        if not self._console.is_terminal:
            self._print_tenth(done, total, label)
        elif self._task is not None:
            self._progress.update(
                self._task, completed=done, total=total, label=label[-LABEL_WIDTH:]
            )

    def _print_tenth(self, done: int, total: int, label: str) -> None:
        """A line every tenth of a stage that takes longer than a few seconds."""
        tenth = 10 * done // total
        if tenth > self._tenth and time.monotonic() - self._printed > SECONDS_PER_LINE:
            self._tenth, self._printed = tenth, time.monotonic()
            sys.stderr.write(f"  {100 * done // total:3d} %  {label}\n")


def settings_lines(settings: dict[str, Any]) -> list[str]:
    """The resolved settings, aligned, one a line."""
    width = max(len(key) for key in settings)
    return [
        f"  {key.ljust(width)}  {value}"
        for key, value in settings.items()
        if value is not None
    ]


def print_settings(command: str, settings: dict[str, Any]) -> None:
    """The resolved settings on stderr, before work starts."""
    for line in (command, *settings_lines(settings)):
        sys.stderr.write(line + "\n")
