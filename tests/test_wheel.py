"""What is installed: the wheel's files, and a device side that needs no heavy package."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mvlm_export.engines.bundle import TOKENIZER, BundleWriter
from tests.engines.manifests import tiny_manifest
from tests.engines.tokenizer_files import write_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engines", "passes", "calibration", "exporter")
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx")

BLOCK_HEAVY = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv.pop(1))
"""
"""Takes the folder of the unpacked wheel as the first argument."""

COMMANDS = {"mvlm": "main", "mvlm-export": "export_main"}
"""The function of ``mvlm_export.exporter.cli.main`` behind each command."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that setuptools writes nothing into the checkout."""
    folder = tmp_path_factory.mktemp("source")
    leave_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    return shutil.copytree(ROOT, folder / "mvlm-export", ignore=leave_out)


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    made = subprocess.run(pip, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def lean(unpacked: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code on the unpacked wheel where the heavy packages cannot be imported."""
    python = [sys.executable, "-c", BLOCK_HEAVY + code, str(unpacked), *arguments]
    return subprocess.run(
        python, capture_output=True, text=True, cwd=unpacked, stdin=subprocess.DEVNULL
    )


def command(unpacked: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    function = COMMANDS[name]
    code = f"from mvlm_export.exporter.cli.main import {function}; {function}()"
    return lean(unpacked, code, *arguments)


def expected_files(source: Path) -> set[str]:
    """What the wheel should hold: every module, every asset, the type markers."""
    assets = source / "exporter" / "assets"
    files = {path for path in assets.rglob("*") if path.is_file()}
    for folder in FOLDERS:
        files |= {*(source / folder).rglob("*.py"), *(source / folder).rglob("py.typed")}
    return {f"mvlm_export/{path.relative_to(source).as_posix()}" for path in files}


def test_the_wheel_holds_every_module_and_asset_alone(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected_files(source)
    assert {
        "mvlm_export/engines/py.typed",
        "mvlm_export/passes/py.typed",
        "mvlm_export/exporter/assets/nano/config.json",
        "mvlm_export/exporter/assets/nano/model.safetensors",
        "mvlm_export/exporter/assets/nano/tokenizer.model",
        "mvlm_export/exporter/assets/samples/samples.jsonl",
        "mvlm_export/exporter/cli/main.py",
        "mvlm_export/exporter/models/llama.py",
        "mvlm_export/calibration/data.py",
    } <= files


def test_one_top_level_package_and_two_commands(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    assert {path.name for path in unpacked.iterdir()} == {"mvlm_export", info.name}
    assert (info / "top_level.txt").read_text().split() == ["mvlm_export"]
    commands = configparser.ConfigParser()
    commands.read(info / "entry_points.txt")
    assert dict(commands["console_scripts"]) == {
        "mvlm": "mvlm_export.exporter.cli.main:main",
        "mvlm-export": "mvlm_export.exporter.cli.main:export_main",
    }


def test_heavy_packages_are_optional(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist: ")]
    always = [line for line in required if "extra ==" not in line]
    assert always
    assert len(always) < len(required)
    assert not any(name in line for line in always for name in HEAVY)


@pytest.mark.parametrize(
    "module",
    ["mvlm_export.engines", "mvlm_export.engines.vlm", "mvlm_export.exporter.cli.main"],
)
def test_device_modules_import_without_heavy_packages(unpacked: Path, module: str) -> None:
    code = f"import {module} as found; print(found.__file__)"
    ran = lean(unpacked, code)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(unpacked), "not the wheel's own module"


def test_the_block_holds(unpacked: Path) -> None:
    for package in HEAVY:
        ran = lean(unpacked, f"import {package}")
        assert ran.returncode == 1
        assert f"ModuleNotFoundError: No module named {package!r}" in ran.stderr


def write_bundle(folder: Path, target: str, jetpack: int | None) -> None:
    """A bundle of empty graphs: enough for what stops before they are opened."""
    manifest = tiny_manifest(target=target, jetpack=jetpack)
    with BundleWriter(folder) as writer:
        for graph in manifest.graphs.values():
            (writer.folder / graph.file).parent.mkdir()
            (writer.folder / graph.file).touch()
        write_tokenizer(writer.folder / TOKENIZER)
        writer.seal(manifest)
        writer.commit()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles, each named as its target."""
    folder = tmp_path_factory.mktemp("bundles")
    for target, jetpack in (("cpu", None), ("rtx", None), ("orin", 6)):
        write_bundle(folder / target, target, jetpack)
    return folder


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("mvlm run {}/cpu --prompt x", "cpu"),
        ("mvlm run {}/cpu --prompt x --provider cuda", "gpu"),
        ("mvlm chat {}/cpu", "cpu"),
        ("mvlm build {}/rtx", "rtx"),
        ("mvlm build {}/orin", "tensorrt"),
        ("mvlm parity {}/cpu", "export"),
        ("mvlm export --target cpu", "export"),
        ("mvlm-export --target cpu", "export"),
    ],
)
def test_a_command_names_the_extra_it_lacks(
    unpacked: Path, bundles: Path, line: str, extra: str
) -> None:
    ran = command(unpacked, *line.format(bundles).split())
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert re.search(rf"mvlm-export\[({extra})\]", ran.stderr), ran.stderr


@pytest.mark.parametrize("line", ["mvlm --help", "mvlm-export --help", "mvlm doctor --json"])
def test_commands_that_need_no_extra(unpacked: Path, line: str) -> None:
    ran = command(unpacked, *line.split())
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
