"""Importing what runs on the device brings in none of the heavy packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "onnx",
    "onnx_ir",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "onnxruntime",
    "transformers",
)
MODULES = (
    "mvlm_export.engines",
    "mvlm_export.engines.vlm",
    "mvlm_export.engines.trt_builder",
    "mvlm_export.engines.build",
    "mvlm_export.engines.triton_front",
    "mvlm_export.exporter.cli.main",
    "mvlm_export.exporter.triton_repository",
)


def heavy_after(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize("module", MODULES)
def test_import_is_lean(module: str) -> None:
    assert heavy_after(f"import {module}") == []


def test_the_public_names_are_lean() -> None:
    assert heavy_after("from mvlm_export.engines import VLM, SamplingParams, Answer") == []


def test_the_check_can_fail() -> None:
    assert heavy_after("import onnxruntime") == ["onnxruntime"]
