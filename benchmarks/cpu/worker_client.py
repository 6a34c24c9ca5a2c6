"""The driver's end of a worker: start it, ask it, end it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerFailedError(Exception):
    """A worker ended instead of answering."""


class WorkerClient:
    """A worker process; a context manager, which ends it.

    Args:
        python: interpreter of its environment.
        script: the worker.
        spec: what it is told first.
        log: gets what it and its libraries print.

    Raises:
        WorkerFailedError: it did not load.
    """

    def __init__(self, python: Path, script: Path, spec: Mapping[str, Any], log: Path) -> None:
        variables = dict.fromkeys(THREAD_VARIABLES, str(spec["threads"]))
        self._log = log
        with log.open("a") as file:
            self._process = subprocess.Popen(
                [str(python), str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **variables},
            )
        try:
            self.loaded = self._exchange(spec)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """One request and its reply.

        Raises:
            WorkerFailedError: it ended.
        """
        return self._exchange({"do": do, **details})

    def _exchange(self, content: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerFailedError(f"ended with code {code}; what it said is in {self._log}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
