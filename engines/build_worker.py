"""The process that one build runs in: ``python -m mvlm_export.engines.build_worker``.

A pickled ``Request`` comes in on stdin, which then stays open: its end means that the parent
does not want the build any more, or is gone. Lines of JSON go out on what was stdout:
``{"phase", "fraction"}`` and at last ``{"done"}`` or ``{"failed"}``. What TensorRT's libraries
print lands on stderr.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from .build_options import BuildOptions
from .errors import MvlmError
from .targets import Target
from .trt_api import BuildProgress, ProgressTracker
from .trt_builder import BuildJob, build_engine, open_job
from .trt_diagnostics import BuildFailedError
from .trt_profiles import ProfileSpec


@dataclass(frozen=True)
class Request:
    """What a worker is asked for; every path is absolute.

    Attributes:
        task: a key of ``TASKS``.
        plan_path: where a finished plan goes.
        node: of task "part": the ONNX node that the graph is cut behind.
    """

    task: str
    onnx_path: Path
    plan_path: Path
    profiles: tuple[ProfileSpec, ...]
    target: Target
    options: BuildOptions
    timing_cache: Path | None
    compute_capability: tuple[int, int] | None
    node: str = ""


Report = Callable[[BuildProgress], None]


def _build(request: Request, report: Report) -> dict[str, Any]:
    result = build_engine(
        request.onnx_path,
        request.plan_path,
        request.profiles,
        target=request.target,
        options=request.options,
        timing_cache=request.timing_cache,
        compute_capability=request.compute_capability,
        progress=report,
    )
    return {**result.to_json(), "peak_memory": peak_memory()}


def _list_nodes(request: Request, report: Report) -> list[dict[str, str]]:
    job = _open(request, report)
    with job.log.collecting() as job.records:
        return [asdict(node) for node in job.list_nodes()]


def _build_part(request: Request, report: Report) -> None:
    job = _open(request, report)
    with job.log.collecting() as job.records:
        job.build_part(request.node)


def _open(request: Request, report: Report) -> BuildJob:
    return open_job(
        request.onnx_path,
        request.profiles,
        request.target,
        tracker=ProgressTracker(report),
        options=request.options,
        timing_cache=request.timing_cache,
        compute_capability=request.compute_capability,
    )


TASKS: dict[str, Callable[[Request, Report], Any]] = {
    "build": _build,
    "nodes": _list_nodes,
    "part": _build_part,
}
"""What a worker can do: build a plan, list where the graph can be cut, build a part of it."""


def peak_memory() -> int:
    """Largest resident set of this process in bytes.

    ``getrusage`` of a process that another one started counts what that one held when it did
    (the kernel hands ``maxrss`` on through exec), so Linux's own figure of this address space,
    VmHWM, comes first.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _take_stdout() -> TextIO:
    """What was stdout, for this module alone; others' prints go to stderr from here on."""
    mine = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return mine


def _end_with_parent(pipe: int) -> None:
    """End this process when the parent closes its side: nothing that is kept is written here.

    The descriptor is read and not ``sys.stdin``, whose lock Python wants when it ends.
    """
    while os.read(pipe, 1):
        pass
    os._exit(1)


def main() -> None:
    """Serve one request."""
    # The parent decides on Ctrl-C; a signal meant for this process alone ends it at once, and
    # not by an exception in TensorRT's callbacks.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    replies = _take_stdout()
    request: Request = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, args=(sys.stdin.fileno(),), daemon=True).start()

    def send(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def report(state: BuildProgress) -> None:
        send(phase=state.phase, fraction=state.fraction)

    try:
        send(done=TASKS[request.task](request, report))
    except MvlmError as error:
        errors = error.errors if isinstance(error, BuildFailedError) else ()
        send(failed={"type": type(error).__name__, "text": str(error), "errors": errors})


if __name__ == "__main__":
    main()
