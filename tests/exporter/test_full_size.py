"""The true geometries with random weights, through the whole compile; minutes and gigabytes.

Run by hand: ``pytest -m slow tests/exporter/test_full_size.py``.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import sentencepiece_model_pb2

from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.config import published_config_json
from mvlm_export.exporter.settings import CompileSettings
from tests.engines.tokenizer_files import write_tokenizer
from tests.helpers import write_random_checkpoint

from .conftest import Silent

pytestmark = pytest.mark.slow


def write_wide_tokenizer(folder, pieces):
    """The small test tokenizer, filled up with pieces that no text holds."""
    write_tokenizer(folder)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    for index in range(len(model.pieces), pieces):
        model.pieces.add(piece=f"\u2581filler{index}", score=-1e6)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def photo_samples(folder):
    folder.mkdir()
    rows, columns = np.mgrid[0:240, 0:320]
    pixels = np.stack([columns % 256, rows, (rows * columns) // 300 % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "photo.png")
    line = {"image": "photo.png", "prompt": "What is in the picture?"}
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.mark.parametrize(
    ("name", "layers", "fmt", "target", "recipe"),
    [
        ("v2-1.7b", None, "bin", "cpu", "fp32"),
        ("v2-1.7b", None, "safetensors-sharded", "orin", "fp16"),
        ("v2-3b", 2, "bin", "cpu", "fp32"),
        ("v2-3b", 2, "bin", "rtx", "fp16"),
    ],
    ids=["1.7B-bin-cpu", "1.7B-safetensors-orin", "3B-cut-cpu", "3B-cut-rtx"],
)
def test_true_geometry(tmp_path, name, layers, fmt, target, recipe):
    config = published_config_json(name)
    if layers is not None:
        config["num_hidden_layers"] = layers
    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, config, fmt=fmt, dtype=torch.bfloat16)
    write_wide_tokenizer(checkpoint, config["vocab_size"])
    settings = CompileSettings(
        output=tmp_path / "bundle",
        model=checkpoint,
        target=target,
        recipe=recipe,
        samples=photo_samples(tmp_path / "samples"),
    )
    result = compile_checkpoint(settings, Silent())
    assert result.parity is not None
    print(json.dumps(result.report["parity"]["graphs"], indent=1))
    print(json.dumps(result.report["seconds"], indent=1))
    assert result.parity.passed, result.parity.failures
    assert len(result.parity.end_to_end.answers) == 1
