"""A virtual environment as a device has it: the base install, TensorRT-RTX, and no more.

Run by hand: ``pytest -m slow tests/device``. It installs packages from a package index.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.manifest import GRAPHS
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings
from tests.exporter.conftest import Silent

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnx_ir", "transformers")


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a new environment with this package's wheel and its extra ``rtx``."""
    folder = tmp_path_factory.mktemp("device")
    leave_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=leave_out)
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    )
    run(*pip, "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv")
    run(folder / "venv" / "bin" / "pip", "install", "--quiet", f"{wheel}[rtx]")
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano model for ``rtx`` in FP16; its plans taken out, as on the way to a device."""
    output = tmp_path_factory.mktemp("bundle") / "nano"
    settings = CompileSettings(output=output, target="rtx", parity=False, threads=1)
    bundle = compile_checkpoint(settings, Silent()).bundle
    shutil.rmtree(bundle.path / "engines")
    return bundle.path


def test_nothing_heavy_is_installed(binaries: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {HEAVY!r} if u.find_spec(n)])"
    assert run(binaries / "python", "-c", code).strip() == "[]"


def test_the_whole_build(binaries: Path, compiled: Path) -> None:
    record = json.loads(run(binaries / "mvlm", "build", compiled, "--json"))
    assert record["built"] == sorted(GRAPHS)
    bundle = Bundle.load(compiled)
    bundle.verify_engines()
    assert list(bundle.engines()) == [record["folder"]]
    again = json.loads(run(binaries / "mvlm", "build", compiled, "--json"))
    assert again["built"] == []
    assert {state["status"] for state in again["before"].values()} == {"fresh"}
