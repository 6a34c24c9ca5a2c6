"""A build in a process of its own: memory goes back, a crash is an error, bytes repeat.

TensorRT keeps what a build took, names things by counters that go on from build to build, and
on a bug or without memory ends its process. So each plan gets a fresh one, started by its name
and not forked or spawned by ``multiprocessing``: a fork would share CUDA's state, and a spawn
would run the caller's script again. What the process writes lands in a temporary folder that
goes with it, so that nothing half-made is left whichever way it ends.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from . import errors as error_tree
from .build_options import BuildOptions
from .build_result import BuildResult
from .build_worker import Request
from .errors import EngineError
from .targets import Target
from .trt_api import BuildProgress, ProgressCallback
from .trt_diagnostics import BuildFailedError
from .trt_profiles import ProfileSpec

WORKER = "mvlm_export.engines.build_worker"
_GRACE = 2.0
"""Seconds that a worker may take to end after its stdin was closed."""
_TAIL = 6
"""Lines of a crashed worker's stderr that are shown."""

_OUT_OF_MEMORY = (
    "most often Linux ran out of memory and ended it. Close what else uses memory, add swap, "
    "give a smaller --workspace-mb, or choose the INT4 recipe"
)
_BUG = (
    "this is a fault of TensorRT or of its installation. Run `mvlm doctor`; where parts of "
    "the graph show which node it is about, that node is named below"
)
_CRASHES = {
    "SIGKILL": _OUT_OF_MEMORY,
    "SIGINT": "something sent it this signal. Start the build again",
    "SIGTERM": "something sent it this signal. Start the build again",
}


class WorkerCrashError(BuildFailedError):
    """The building process ended without an answer."""


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    profiles: Sequence[ProfileSpec],
    *,
    target: Target,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    compute_capability: tuple[int, int] | None = None,
    progress: ProgressCallback | None = None,
) -> BuildResult:
    """``trt_builder.build_engine`` in a process of its own; see there for the arguments.

    Ctrl-C ends that process and passes on; so does an error of ``progress``, which is called
    in this thread.

    Raises:
        EngineError: as there, or the process crashed or was ended by a signal
            (``WorkerCrashError``).
        MissingPackageError: the TensorRT package is not here.
        InputError: the target has no engines.
    """
    plan_path = plan_path.absolute()
    with BuildFolder(plan_path, timing_cache) as folder:
        request = Request(
            "build",
            onnx_path.absolute(),
            folder.plan,
            tuple(profiles),
            target,
            options or BuildOptions(),
            folder.timing_cache,
            compute_capability,
        )
        done = call_worker(request, progress)
        folder.keep()
    return BuildResult.from_json(done, plan_path)


class BuildFolder:
    """A temporary folder beside the plan, with a copy of the timing cache.

    Leaving the block removes it; ``keep`` moves plan and timing cache to their places before.
    """

    def __init__(self, plan_path: Path, timing_cache: Path | None) -> None:
        self._plan_place = plan_path
        self._cache_place = timing_cache

    def __enter__(self) -> BuildFolder:
        parent = self._plan_place.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=".build.", dir=parent))
            self.plan = self._folder / self._plan_place.name
            self.timing_cache = self._cache_place and self._folder / self._cache_place.name
            if self._cache_place and self.timing_cache and self._cache_place.is_file():
                shutil.copyfile(self._cache_place, self.timing_cache)
        except OSError as error:
            raise EngineError(
                f"Cannot write {self._plan_place}: {error}. Free some space or choose another "
                "folder."
            ) from error
        return self

    def keep(self) -> None:
        """Move what was built into place."""
        self.plan.replace(self._plan_place)
        if self._cache_place and self.timing_cache and self.timing_cache.is_file():
            self.timing_cache.replace(self._cache_place)

    def __exit__(self, *unused: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class _Ending:
    """How a worker ended: its return code, negative for a signal, and what it printed last."""

    code: int
    printed: str
    phase: str

    @property
    def cause(self) -> str:
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"

    def describe(self, request: Request) -> str:
        """One message for a build that ended so."""
        during = f" during {self.phase!r}" if self.phase else " before TensorRT began"
        said = f"\n  It printed last:\n{self.printed}" if self.printed else ""
        return (
            f"The process that builds from {request.onnx_path} ended{during} ({self.cause}): "
            f"{_CRASHES.get(self.cause, _BUG)}. Nothing half-made is left.{said}"
        )


def call_worker(request: Request, progress: ProgressCallback | None = None) -> Any:  # noqa: ANN401
    """Have a fresh process do a task; what it gave back.

    Raises:
        MvlmError: whatever the task raised; ``WorkerCrashError`` if it did not end by itself.
    """
    with tempfile.TemporaryFile() as printed, _start(printed) as child:
        try:
            _send(child, request)
            reply, phase = _listen(child, progress)
            code = child.wait()
        except BaseException:
            _stop(child)
            raise
        if reply is None or code != 0:
            ending = _Ending(code, _read_tail(printed), phase)
            raise WorkerCrashError(ending.describe(request), (f"crash: {ending.cause}",))
    if "failed" in reply:
        raise _rebuild_error(**reply["failed"])
    return reply["done"]


def _start(printed: IO[bytes]) -> subprocess.Popen[bytes]:
    # Its own session: a Ctrl-C in the terminal reaches the parent alone, which ends the child.
    # Its own path: the child must find the very package that is running here.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100
    try:
        return subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    except OSError as error:
        raise EngineError(
            f"An engine is built in a process of its own, and {sys.executable!r} cannot be "
            f"started for it ({error}). Close other programs, or install Python anew."
        ) from error


def _send(child: subprocess.Popen[bytes], request: Request) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(pickle.dumps(request))
        child.stdin.flush()
    except BrokenPipeError:  # it has ended already: its return code says why
        with suppress(BrokenPipeError):  # closing tries to write what is left once more
            child.stdin.close()


def _listen(
    child: subprocess.Popen[bytes], progress: ProgressCallback | None
) -> tuple[dict[str, Any] | None, str]:
    """Read messages until the worker closes its side: the answer, the phase last heard of."""
    assert child.stdout is not None
    reply, phase = None, ""
    for line in child.stdout:
        message = json.loads(line)
        if "phase" not in message:
            reply = message
            continue
        phase = message["phase"]
        if progress is not None:
            progress(BuildProgress(phase, message["fraction"]))
    return reply, phase


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a worker: ask by closing its stdin, then kill."""
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _read_tail(printed: IO[bytes]) -> str:
    printed.seek(0)
    lines = printed.read().decode(errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-_TAIL:])


def _rebuild_error(type: str, text: str, errors: Sequence[str]) -> Exception:  # noqa: A002
    """The worker's error, of its own class."""
    if type == BuildFailedError.__name__:
        return BuildFailedError(text, errors)
    found: Callable[[str], Exception] = getattr(error_tree, type, EngineError)
    return found(text)


def part_request(request: Request, node: str) -> Request:
    """The same build of the graph's part up to a node."""
    return replace(request, task="part", node=node)
