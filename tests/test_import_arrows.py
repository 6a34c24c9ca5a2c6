"""The arrows of docs/architecture.md, held on every import statement, lazy ones included.

engines <- passes <- calibration <- exporter, and which third-party packages each may use.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mvlm_export"
FOLDERS = {
    "engines": {"engines"},
    "passes": {"engines", "passes"},
    "calibration": {"engines", "passes", "calibration"},
    "exporter": {"engines", "passes", "calibration", "exporter"},
}
"""A folder and the folders it may import."""

DEVICE = {"numpy", "PIL", "sentencepiece", "click", "rich"}
LAZY_DEVICE = {
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "triton_python_backend_utils",
}
GRAPHS = {
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnx_graphsurgeon",
    "onnxscript",
    "google",
}  # google.protobuf
THIRD_PARTY = {
    "engines": DEVICE | LAZY_DEVICE,
    "passes": GRAPHS | {"onnxruntime"},
    "calibration": DEVICE | GRAPHS | {"onnxruntime", "torch"},
    "exporter": DEVICE | GRAPHS | {"onnxruntime", "torch", "safetensors"},
}
LAZY_ONLY = {"engines": LAZY_DEVICE, "passes": {"onnxruntime"}, "calibration": {"torch"}}
"""Packages that a folder may import inside functions alone."""


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path


def package_of(path: Path) -> str:
    return ".".join((PACKAGE, *path.relative_to(ROOT).parent.parts))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Absolute names of all that is imported below a node, and whether it waits for a call."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            name = importlib.util.resolve_name(base, package)
            # `from mvlm_export import exporter` names a folder too.
            yield from ((f"{name}.{alias.name}", lazy) for alias in child.names)
        else:
            waits = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(child, package, lazy or waits or is_type_checking(child))


def complaints(folder: str, package: str, source: str) -> list[str]:
    found = []
    for name, lazy in imports(ast.parse(source), package):
        top, *rest = name.split(".")
        if top == PACKAGE:
            if not rest or rest[0] not in FOLDERS[folder]:
                found.append(f"{folder} must not import {name}")
        elif top not in sys.stdlib_module_names and top not in THIRD_PARTY[folder]:
            found.append(f"{folder} must not use {top}")
        elif top in LAZY_ONLY.get(folder, ()) and not lazy:
            found.append(f"{folder} must import {top} inside a function")
    return found


@pytest.mark.parametrize(
    ("folder", "path"), list(modules()), ids=lambda value: getattr(value, "stem", value)
)
def test_arrows_hold(folder: str, path: Path) -> None:
    assert complaints(folder, package_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("folder", "package", "source", "complaint"),
    [
        ("engines", "engines", "import torch", "engines must not use torch"),
        ("engines", "engines", "def f():\n    import onnx.helper", "must not use onnx"),
        ("engines", "engines", "from ..passes import x", "not import mvlm_export.passes.x"),
        ("engines", "engines", "from mvlm_export import exporter", "mvlm_export.exporter"),
        ("engines", "engines", "import onnxruntime as ort", "inside a function"),
        ("passes", "passes", "def f():\n    from torch import nn", "must not use torch"),
        ("passes", "passes", "from ..calibration.data import S", "mvlm_export.calibration"),
        ("calibration", "calibration", "import torch", "torch inside a function"),
        ("calibration", "calibration", "from ..exporter import x", "mvlm_export.exporter"),
        ("exporter", "exporter.models", "import transformers", "must not use transformers"),
    ],
)
def test_a_broken_arrow_is_found(
    folder: str, package: str, source: str, complaint: str
) -> None:
    found = complaints(folder, f"{PACKAGE}.{package}", source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("folder", "package", "source"),
    [
        ("engines", "engines", "def f():\n    import onnxruntime"),
        ("engines", "engines", "from .bundle import Bundle\nfrom . import errors"),
        ("passes", "passes", "from ..engines.targets import Target\nimport onnx"),
        ("calibration", "calibration", "def f():\n    import torch"),
        ("exporter", "exporter.models", "from ..config import C\nimport torch, json"),
    ],
)
def test_what_is_allowed_passes(folder: str, package: str, source: str) -> None:
    assert complaints(folder, f"{PACKAGE}.{package}", source) == []


def test_every_folder_was_walked() -> None:
    walked = [folder for folder, _ in modules()]
    assert set(walked) == set(FOLDERS)
    assert walked.count("engines") > 10
