"""The peers' environments, made once from the package index by pip."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Environment:
    """A peer's packages; ``variables`` are set while they are built."""

    requirements: str
    variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS: Mapping[str, Environment] = {
    # Built here, for all that this CPU can do.
    "llama": Environment("requirements-llama.txt", {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
    "genai": Environment("requirements-genai.txt"),
}


def python_of(env: str, work: Path) -> Path:
    """The interpreter of an environment; ``ours`` is the one that runs this."""
    return Path(sys.executable) if env == "ours" else work / "env" / env / "bin" / "python"


def make_environment(env: str, work: Path, log: Path) -> None:
    """Install an environment that is not there yet.

    Raises:
        RuntimeError: pip failed.
    """
    folder = work / "env" / env
    if env == "ours" or (folder / "bin" / "python").exists():
        return
    wanted = ENVIRONMENTS[env]
    unfinished = folder.with_name(f"{env}.unfinished")
    venv.create(unfinished, with_pip=True, clear=True)
    command = [
        str(unfinished / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--requirement",
        str(HERE / wanted.requirements),
    ]
    with log.open("w") as file:
        done = subprocess.run(
            command, env={**os.environ, **wanted.variables}, stdout=file, stderr=file
        )
    if done.returncode:
        raise RuntimeError(
            f"pip could not install {wanted.requirements}; what it said is in {log}. The "
            "llama.cpp environment needs a C++ compiler."
        )
    unfinished.rename(folder)
