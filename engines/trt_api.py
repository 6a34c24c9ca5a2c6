"""The one door to ``tensorrt`` 10.3 to 11 and ``tensorrt_rtx``: loading, log, progress.

The two packages share an API but not all of its names, and some numbers differ, so callers ask
for names with ``hasattr`` and never write a flag's number.
"""

from __future__ import annotations

import functools
import importlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import EngineError, InputError, MissingPackageError

# What ``import tensorrt`` gives, and its objects: no stubs cover both packages.
TensorRT = Any
TrtObject = Any
T = TypeVar("T")

_CURES = {
    "tensorrt": (
        "On a Jetson TensorRT is JetPack's own system package: `sudo apt install "
        "python3-libnvinfer`, and a virtual environment sees it only if it was made with "
        "`python3 -m venv --system-site-packages`. On a PC with an NVIDIA GPU: `pip install "
        '"mvlm-export[tensorrt]"`. An engine must be built on the device it runs on.'
    ),
    "tensorrt_rtx": 'Install it with: pip install "mvlm-export[rtx]" (no GPU is needed).',
}


def load_tensorrt(kind: str) -> TensorRT:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        InputError: ``kind`` is neither.
        MissingPackageError: the package is not installed, or does not load.
        EngineError: it is older than TensorRT 10 and has no strongly typed networks.
    """
    if kind not in _CURES:
        raise InputError(
            f"{kind!r} builds no engines; the runtimes that do are: {', '.join(_CURES)}. "
            "Choose a target with engines."
        )
    try:
        trt: TensorRT = importlib.import_module(kind)
    except ImportError as error:
        raise MissingPackageError(
            f"Building an engine needs the Python package {kind!r}, which cannot be imported "
            f"({error}). {_CURES[kind]}"
        ) from error
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        raise EngineError(
            f"{kind} {trt.__version__} knows no strongly typed networks. TensorRT 10.3 "
            "(JetPack 6.1) or newer is needed: update JetPack."
        )
    return trt


@dataclass(frozen=True)
class LogRecord:
    """One message of TensorRT; severity is INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.severity.endswith("ERROR")


# Without a GPU every API error is followed by a line on the CUDA driver: noise.
_NOISE = re.compile(r"checkMacros\.cpp::catchCudaError|cudaError 35")


def without_noise(text: str) -> str:
    """The text without the lines that only say that this machine has no GPU."""
    return "\n".join(line for line in text.splitlines() if not _NOISE.search(line)).strip()


class BuildLog:
    """Everything TensorRT said, for one build at a time.

    TensorRT keeps a pointer to the first logger of a process, so there is one for each module,
    for ever; ``collecting`` gives one build the messages it causes.
    """

    def __init__(self, trt: TensorRT) -> None:
        self._records: list[LogRecord] = []
        self._lock = threading.Lock()
        self.logger = _subclass_instance(trt.ILogger, log=self._receive)

    def _receive(self, severity: TrtObject, text: str) -> None:
        name = getattr(severity, "name", str(severity))
        self._records.append(LogRecord(name, text))

    @contextmanager
    def collecting(self) -> Iterator[list[LogRecord]]:
        """The messages from here on; a second build waits until this one has ended."""
        with self._lock:
            self._records = []
            yield self._records


@functools.cache
def tensorrt_log(trt: TensorRT) -> BuildLog:
    """The process's log for this module; runtimes should pass its ``logger`` too."""
    return BuildLog(trt)


@dataclass(frozen=True)
class MemoryFigures:
    """What the INFO log says of an engine, in bytes; None where it says nothing."""

    weights: int | None
    activations: tuple[int, ...]


_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


def read_memory(records: list[LogRecord]) -> MemoryFigures:
    """Weights memory, and activation memory of each profile in order."""
    text = "\n".join(record.text for record in records if record.severity == "INFO")
    weights = _WEIGHTS.findall(text)
    activations = tuple(int(figure) for figure in _ACTIVATIONS.findall(text))
    return MemoryFigures(int(weights[-1]) if weights else None, activations)


def read_warnings(records: list[LogRecord]) -> tuple[str, ...]:
    """Distinct warnings in order, noise filtered out."""
    texts = (without_noise(r.text) for r in records if r.severity == "WARNING")
    return tuple(dict.fromkeys(text for text in texts if text))


@dataclass(frozen=True)
class BuildProgress:
    """How far a build is: the phase last heard of, and the whole as 0.0 to 1.0."""

    phase: str
    fraction: float


ProgressCallback = Callable[[BuildProgress], None]


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0
    child: float = 0.0

    @property
    def fraction(self) -> float:
        return min((self.done + self.child) / max(self.steps, 1), 1.0)


class ProgressTracker:
    """An ``IProgressMonitor`` that folds nested phases into one fraction, and can cancel.

    TensorRT calls from C++, where no Python exception may pass: an error of the callback is
    kept in ``failure`` and stops the build.
    """

    def __init__(self, callback: ProgressCallback | None) -> None:
        self.cancel = threading.Event()
        self.failure: Exception | None = None
        self._callback = callback
        self._phases: dict[str, _Phase] = {}
        self._fraction = 0.0

    def attach(self, trt: TensorRT, config: TrtObject) -> TrtObject:
        """Hook into a builder config where the API has it; keep what is returned alive."""
        if not hasattr(trt, "IProgressMonitor") or not hasattr(config, "progress_monitor"):
            return None
        monitor = _subclass_instance(
            trt.IProgressMonitor,
            phase_start=self._start,
            step_complete=self._step,
            phase_finish=self._finish,
        )
        config.progress_monitor = monitor
        return monitor

    def _start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = _Phase(parent, steps)
        self._report(phase)

    def _step(self, phase: str, step: int) -> bool:
        entry = self._phases.get(phase)
        if entry is not None:
            entry.done, entry.child = max(entry.done, step + 1), 0.0
        self._report(phase)
        return not self.cancel.is_set()

    def _finish(self, phase: str) -> None:
        entry = self._phases.get(phase)
        if entry is not None:
            entry.done, entry.child = entry.steps, 0.0
        self._report(phase)

    def _report(self, phase: str) -> None:
        name: str | None = phase
        while name is not None and name in self._phases:
            entry = self._phases[name]
            parent = self._phases.get(entry.parent or "")
            if parent is None:
                self._fraction = max(self._fraction, entry.fraction)
            else:
                parent.child = max(parent.child, min(entry.fraction, 1.0))
            name = entry.parent
        if self._callback is None or self.failure is not None:
            return
        try:
            self._callback(BuildProgress(phase, self._fraction))
        except Exception as error:  # noqa: BLE001 - raised again once C++ has returned
            self.failure = error
            self.cancel.set()


def _subclass_instance(base: TrtObject, **methods: Callable[..., Any]) -> TrtObject:
    """An instance of a subclass of a TensorRT interface whose methods are these functions."""

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _self, *arguments: function(*arguments)

    def initialise(self: TrtObject) -> None:
        base.__init__(self)

    body: dict[str, Any] = {name: bind(function) for name, function in methods.items()}
    body["__init__"] = initialise
    return type(f"Forwarding{base.__name__}", (base,), body)()


def run_cancellable(function: Callable[[], T], cancel: threading.Event) -> T:
    """Run in a thread of its own, so that Ctrl-C reaches Python and not a C++ callback.

    A KeyboardInterrupt raised inside TensorRT's callbacks would end the process there. The
    waiting thread takes it instead, asks the build to stop, waits for that, and passes it on;
    a second one does not wait.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            errors.append(error)

    worker = threading.Thread(target=work, name="tensorrt-build", daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.2)
    except KeyboardInterrupt:
        cancel.set()
        worker.join()
        raise
    if errors:
        raise errors[0]
    return results[0]
