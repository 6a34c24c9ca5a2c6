"""Every file the engines open, made once in the work folder: a step makes one folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from catalogue import GENAI_FORMS, Engine
from environments import HERE, make_environment, python_of

SOURCE_BUNDLE = "int4-rtn"
"""The bundle of ours whose float encoder the peers' INT8 encoder is made from."""

OWN_RECIPES: Mapping[str, str] = {SOURCE_BUNDLE: str(HERE / "int4-rtn.json")}


@dataclass(frozen=True)
class Step:
    """What makes one folder.

    Attributes:
        env: environment of the command.
        target: the folder, relative to the geometry's.
        command: by that folder, arguments of Python.
        needs: steps that come first.
    """

    env: str
    target: str
    command: Callable[[Path], Sequence[str]]
    needs: Sequence[str] = ("checkpoint",)


class Preparation:
    """Makes what is missing.

    Args:
        work: environments, logs and a folder for each geometry.
        geometry: of the checkpoint.
        recipes: of our bundles by name: a recipe, a JSON file, or the folder of a bundle that
            was compiled already.
    """

    def __init__(self, work: Path, geometry: str, recipes: Mapping[str, str]) -> None:
        self.work = work
        self.folder = work / geometry
        self.logs = work / "logs"
        self._geometry = geometry
        self._recipes = {**OWN_RECIPES, **recipes}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)

    def prepare(self, engine: Engine, say: Callable[[str], None]) -> None:
        """The engine's environment and files.

        Raises:
            RuntimeError: a step failed.
        """
        self._environment(engine.env, say)
        for step in engine.steps:
            self._make(step, say)

    def vocab_size(self) -> int:
        """Of the checkpoint."""
        config = json.loads((self.folder / "checkpoint" / "config.json").read_text())
        return int(config["vocab_size"])

    def file_bytes(self, engine: Engine) -> int:
        """Bytes of all files that the engine opens."""
        total = 0
        for name in engine.files:
            path = (self.folder / name).resolve()
            found = path.rglob("*") if path.is_dir() else [path]
            total += sum(file.stat().st_size for file in found if file.is_file())
        return total

    def _environment(self, env: str, say: Callable[[str], None]) -> None:
        if not python_of(env, self.work).exists():
            say(f"installing the environment {env!r} (the first time; minutes)")
            make_environment(env, self.work, self.logs / f"env-{env}.log")

    def _make(self, name: str, say: Callable[[str], None]) -> None:
        step = self._step(name)
        target = self.folder / step.target
        if target.exists():
            return
        for needed in step.needs:
            self._make(needed, say)
        recipe = self._recipes.get(name.removeprefix("bundle:"), "")
        if name.startswith("bundle:") and (Path(recipe) / "manifest.json").is_file():
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(Path(recipe).resolve())
            return
        self._environment(step.env, say)
        say(f"making {step.target}")
        unfinished = target.with_name(target.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        log = self.logs / f"{self._geometry}-{name.replace(':', '-')}.log"
        command = [str(python_of(step.env, self.work)), *step.command(unfinished)]
        with log.open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=self._variables())
        if done.returncode:
            raise RuntimeError(
                f"{step.target} could not be made; what was said is in {log}. Leave out the "
                "engine that needs it with --engines."
            )
        unfinished.rename(target)

    def _variables(self) -> dict[str, str]:
        path = os.environ.get("PYTHONPATH", "")
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), path]))}

    def _step(self, name: str) -> Step:
        kind, _, detail = name.partition(":")
        return {
            "checkpoint": self._checkpoint,
            "gguf": self._gguf,
            "hf": self._hf,
            "genai": self._genai,
            "bundle": self._bundle,
            "ort-int8-dynamic": self._int8_encoder,
        }[kind](detail)

    def _checkpoint(self, detail: str) -> Step:
        def command(folder: Path) -> Sequence[str]:
            return [str(HERE / "write_checkpoint.py"), self._geometry, str(folder)]

        return Step("ours", "checkpoint", command, needs=())

    def _gguf(self, detail: str) -> Step:
        source = str(self.folder / "checkpoint")
        script = str(HERE / "gguf_files.py")
        return Step("llama", "gguf", lambda folder: [script, source, str(folder)])

    def _hf(self, detail: str) -> Step:
        source, script = str(self.folder / "checkpoint"), str(HERE / "hf_folder.py")
        return Step("ours", "hf", lambda folder: [script, source, str(folder)])

    def _genai(self, detail: str) -> Step:
        form = GENAI_FORMS[detail]
        source, script = str(self.folder / "hf"), str(HERE / "genai_files.py")
        settings = [str(form.block), "true" if form.symmetric else "false"]

        def command(folder: Path) -> Sequence[str]:
            return [script, source, str(folder), *settings]

        return Step("genai", f"genai/{detail}", command, needs=("hf",))

    def _bundle(self, detail: str) -> Step:
        def command(folder: Path) -> Sequence[str]:
            start = "from mvlm_export.exporter.cli.main import export_main; export_main()"
            return [
                *("-c", start, "--model", str(self.folder / "checkpoint")),
                *("--target", "cpu", "--recipe", self._recipes[detail], "--no-parity"),
                *("--output", str(folder), "--overwrite"),
            ]

        return Step("ours", f"bundles/{detail}", command)

    def _int8_encoder(self, detail: str) -> Step:
        source = str(self.folder / "bundles" / SOURCE_BUNDLE)
        script = str(HERE / "int8_encoder.py")

        def command(folder: Path) -> Sequence[str]:
            return [script, source, str(folder)]

        return Step("ours", "ort-int8-dynamic", command, needs=(f"bundle:{SOURCE_BUNDLE}",))


def say_to_stderr(text: str) -> None:
    """Progress of the set-up."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def only_run(work: Path) -> Iterator[None]:
    """The block runs if no other run uses the work folder: both would make the same files.

    Raises:
        RuntimeError: another one does.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"Another comparison runs in {work}; wait for it, or give another --work."
            ) from error
        yield
