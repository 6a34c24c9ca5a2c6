"""A small random checkpoint and a bundle made from it, once a session."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_export.exporter.compile import CompileResult, compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings
from tests.engines.tokenizer_files import write_tokenizer
from tests.helpers import tiny_config_json, write_random_checkpoint


class Silent:
    """A listener that keeps the stages' titles."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def advance(self, done: int, total: int, label: str) -> None:
        pass


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(folder, tiny_config_json(vocab_size=512), fmt="safetensors")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(0)
    lines = []
    for index, size in enumerate(((40, 70), (64, 64))):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        line = {"image": f"{index}.png", "prompt": f"what is picture {index}?", "answer": "?"}
        lines.append(json.dumps(line))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def compiled(
    checkpoint: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> CompileResult:
    """The tiny checkpoint compiled for ``cpu``; tests must not change it."""
    output = tmp_path_factory.mktemp("compiled") / "bundle"
    settings = CompileSettings(output=output, model=checkpoint, samples=samples, threads=1)
    return compile_checkpoint(settings, Silent())
