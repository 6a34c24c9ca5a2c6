"""Runs of the engines, collected; each run is a process of its own."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from catalogue import REFERENCE, Engine
from environments import HERE, python_of
from preparation import Preparation
from results import Results, Run, Subject
from worker_client import THREAD_VARIABLES, WorkerClient, WorkerFailedError
from worker_protocol import PROMPT

WARM_UP = 8
"""Tokens of the answer before the one that counts."""


class Measurement:
    """Measures engines and keeps what they gave.

    Attributes:
        ready: engines whose files are there and that have not failed.
        failures: what went wrong, by engine; such an engine is left out from then on.
    """

    def __init__(
        self, preparation: Preparation, geometry: str, tokens: int, threads: int
    ) -> None:
        self._preparation = preparation
        self._geometry = geometry
        self._tokens = tokens
        self._threads = threads
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._subjects: dict[str, Subject] = {}
        self._versions: dict[str, Mapping[str, str]] = {}
        self._runs: list[Run] = []
        self.ready: list[Engine] = []
        self.failures: dict[str, str] = {}

    def prepare(self, engines: Sequence[Engine], say: Callable[[str], None]) -> None:
        """Install and make what the engines need; those it fails for are left out."""
        for engine in engines:
            try:
                self._preparation.prepare(engine, say)
            except RuntimeError as error:
                say(f"{engine.name}: {error}")
                self.failures[engine.name] = str(error)
                continue
            size = self._preparation.file_bytes(engine)
            self._subjects[engine.name] = Subject(
                engine.name, engine.title, size, engine.encoder
            )
            self.ready.append(engine)

    def measure(self, engine: Engine, round_: int) -> None:
        """One run; an engine that fails is left out of the rounds to come."""
        bandwidth = self._read_bandwidth()
        try:
            taken = self._run(engine)
        except WorkerFailedError as error:
            self.failures[engine.name] = str(error)
            self.ready.remove(engine)
            return
        self._runs.append(Run(round=round_, engine=engine.name, bandwidth=bandwidth, **taken))

    def _run(self, engine: Engine) -> dict[str, Any]:
        """Load, warm up, answer; the fields of a :class:`Run`."""
        work, folder = self._preparation.work, self._preparation.folder
        spec = engine.spec(folder, self._preparation.vocab_size(), self._threads)
        python, script = python_of(engine.env, work), HERE / engine.worker
        log = self._preparation.logs / f"worker-{engine.name}.log"
        tokens = engine.tokens or self._tokens
        with WorkerClient(python, script, spec, log) as worker:
            worker.ask("answer", tokens=min(WARM_UP, tokens))
            taken = worker.ask("answer", tokens=tokens)
            if engine.whole:
                taken |= worker.ask("whole", tokens=tokens)
            if engine.name not in self._versions:
                self._note(engine, worker)
        return {**taken, "load": worker.loaded["load"]}

    def _note(self, engine: Engine, worker: WorkerClient) -> None:
        """What does not change from round to round; the outputs, for comparing."""
        loaded = worker.loaded
        self._versions[engine.name] = loaded.get("versions", {})
        subject = self._subjects[engine.name]
        self._subjects[engine.name] = replace(
            subject,
            weights_read=loaded.get("weights_read"),
            kv_row_bytes=loaded.get("kv_row_bytes"),
        )
        worker.ask("outputs", file=str(self._outputs_of(engine.name)))

    def _outputs_of(self, name: str) -> Path:
        folder = self._preparation.folder / "outputs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.npz"

    def _read_bandwidth(self) -> float:
        """GB/s, by a process of its own."""
        variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")}
        command = [str(python_of("ours", self._preparation.work)), str(HERE / "bandwidth.py")]
        done = subprocess.run(
            [*command, str(self._threads)],
            check=True,
            capture_output=True,
            text=True,
            env=variables,
        )
        return float(max(json.loads(done.stdout).values()))

    def results(self) -> Results:
        """What follows from the runs so far."""
        subjects = [
            replace(subject, cosine=self._cosines(subject.name))
            for subject in self._subjects.values()
        ]
        return Results(subjects, self._runs, self._tokens)

    def _cosines(self, name: str) -> dict[str, float]:
        """Of an engine's outputs with the reference's, where both are known."""
        ours, theirs = self._outputs_of(name), self._outputs_of(REFERENCE)
        if name == REFERENCE or not (ours.exists() and theirs.exists()):
            return {}
        with np.load(ours) as found, np.load(theirs) as wanted:
            return {key: cosine(found[key], wanted[key]) for key in found if key in wanted}

    def heading(self) -> str:
        """What the picture says above."""
        cpu = cpu_facts()["model"]
        return f"MobileVLM {self._geometry} on {self._threads} threads of {cpu}"

    def to_json(self) -> dict[str, Any]:
        """Everything: machine, settings, versions, runs and what follows from them."""
        results = self.results()
        bandwidth = results.bandwidth()
        return {
            "date": self._started.isoformat(timespec="seconds"),
            "machine": {"platform": platform.platform(), **cpu_facts()},
            "settings": {
                "geometry": self._geometry,
                "threads": self._threads,
                "prompt": PROMPT,
                "tokens": self._tokens,
            },
            "bandwidth": None if bandwidth is None else asdict(bandwidth),
            "figures": [figures.to_json() for figures in results.all_figures()],
            "versions": self._versions,
            "failures": self.failures,
            "subjects": [asdict(subject) for subject in results.subjects.values()],
            "runs": [asdict(run) for run in self._runs],
        }


def cosine(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Of the angle between two tensors."""
    a, b = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def cpu_facts() -> dict[str, Any]:
    """Model, cores and instruction sets of this CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    pairs = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in pairs.items()}
    flags = facts.get("flags", facts.get("Features", "")).split()
    wanted = ("avx", "fma", "f16c", "amx", "asimd", "sve", "i8mm", "bf16")
    return {
        "model": facts.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in flags if flag.startswith(wanted)],
    }
