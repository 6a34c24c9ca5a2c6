"""Wheels for a machine without a network, cut into loads that can be sent one by one.

    python benchmarks/gpu/carry.py --output .gpu/loads [--load-mb 60] [--have PACKAGES.txt]

Versions are those of ``requirements.lock`` for the other machine's Python. PyTorch and NumPy
are not carried: the other machine has them. Runs where a package index can be reached.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from packaging.requirements import Requirement
from parts import LARGEST_LOAD, PartsError, split

LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"

SOURCE_ONLY = frozenset({"tensorrt-rtx-cu13"})
"""Published as source alone, of pure Python: pip makes the wheel."""

NEEDED = (
    "tensorrt-rtx-cu13",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "cuda-pathfinder",
    "onnx",
    "onnx-graphsurgeon",
    "onnx-ir",
    "onnxscript",
    "ml-dtypes",
    "protobuf",
    "safetensors",
    "sentencepiece",
    "pillow",
    "click",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "packaging",
    "typing-extensions",
    "flatbuffers",
    "onnxruntime-gpu",
)
"""What ``mvlm`` needs to compile, build, run and compare, in the order in which it travels:
what TensorRT-RTX needs first."""

SAME_VERSION = {"onnxruntime-gpu": "onnxruntime"}
"""Packages that are not in the lock file, and the one there whose version they have."""


def locked_versions(python: str, architecture: str, lock: Path = LOCK) -> dict[str, str]:
    """Name to version, as the lock file has it for a Python on Linux.

    Args:
        python: "3.12".
        architecture: "x86_64".
    """
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": architecture,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
        "extra": "",
    }
    found = {}
    for line in lock.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = requirement.specifier
            found[requirement.name] = version.version
    return found


def read_names(path: Path | None) -> frozenset[str]:
    """Packages of a ``pip freeze``, or of plain names, one a line."""
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    names = (re.match(r"[A-Za-z0-9][\w.-]*", line.strip()) for line in lines)
    return frozenset(re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name)


def choose(versions: dict[str, str], have: Collection[str]) -> list[str]:
    """What to carry, as pip takes it.

    Args:
        versions: of :func:`locked_versions`.
        have: names that the other machine has, of whatever version.
    """
    return [
        f"{name}=={versions[SAME_VERSION.get(name, name)]}"
        for name in NEEDED
        if name not in have
    ]


def platforms(architecture: str) -> list[str]:
    """Tags of wheels for Linux with a glibc of 2.39 at most; pip takes each as it stands."""
    newer = [f"manylinux_2_{minor}_{architecture}" for minor in range(39, 4, -1)]
    return [*newer, *(f"manylinux{old}_{architecture}" for old in ("2014", "2010", "1"))]


def fetch(requirement: str, folder: Path, python: str, architecture: str) -> Path:
    """Download a wheel, or make it where there is source alone.

    Raises:
        PartsError: pip cannot, or what it made holds compiled code.
    """
    before = set(folder.glob("*.whl"))
    if requirement.split("==")[0] in SOURCE_ONLY:
        command = ["wheel", "--wheel-dir", str(folder)]
    else:
        command = ["download", "--only-binary=:all:", "--dest", str(folder)]
        command += ["--implementation=cp", f"--python-version={python}"]
        command += [f"--platform={tag}" for tag in platforms(architecture)]
    line = [sys.executable, "-m", "pip", *command]
    line += ["--no-deps", "--quiet", "--disable-pip-version-check", requirement]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise PartsError(f"{requirement} cannot be fetched: {said[-1]} Is the index reached?")
    (wheel,) = set(folder.glob("*.whl")) - before
    if requirement.split("==")[0] in SOURCE_ONLY and not wheel.name.endswith("-any.whl"):
        raise PartsError(f"{wheel.name} was compiled for this machine: carry it by hand.")
    return wheel


def main(arguments: list[str] | None = None) -> int:
    """Fetch and cut; 2 if it cannot be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path(".gpu/loads"), help="new folder for the loads")
    add("--load-mb", type=float, default=LARGEST_LOAD / 1e6, help="MB (10**6) of a load")
    add("--have", type=Path, help="packages that the other machine has: its `pip freeze`")
    add("--python-version", default="3.12", help="of the other machine")
    add("--architecture", default="x86_64", help="of the other machine")
    given = parser.parse_args(arguments)
    python, architecture = given.python_version, given.architecture
    try:
        versions = locked_versions(python, architecture)
        with tempfile.TemporaryDirectory(prefix="wheels.") as place:
            wheels = []
            for requirement in choose(versions, read_names(given.have)):
                wheels.append(fetch(requirement, Path(place), python, architecture))
                print(f"{wheels[-1].stat().st_size / 1e6:8.2f} MB  {wheels[-1].name}")
            total = sum(wheel.stat().st_size for wheel in wheels)
            index = split(wheels, given.output, int(given.load_mb * 1e6))
    except PartsError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{len(wheels)} wheels, {total / 1e6:.1f} MB, {index.loads} loads in {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
