"""A checkpoint of a published geometry with random weights, for measuring without the weights.

Names and shapes are those of the published files; values are normal with a deviation of
fan-in ** -0.5, norms are near 1, so activations keep their size through the layers.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mvlm_export.exporter.config import parse_config, published_config_json
from mvlm_export.exporter.preflight import expected_shapes
from mvlm_export.exporter.settings import nano_checkpoint

PREFIXES = {
    "vision_encoder": "model.vision_tower.vision_tower.vision_model.",
    "projector": "model.mm_projector.",
    "decoder": "",
}
SHARD_BYTES = 1 << 30


def write_random_checkpoint(folder: Path, geometry: str) -> None:
    """Write ``config.json``, nano's tokenizer and bfloat16 weights in shards.

    Args:
        geometry: ``v2-1.7b``, ``v2-3b`` or ``v2-7b``.

    Raises:
        InputError: there is no such geometry.
    """
    write_random_weights(folder, published_config_json(geometry))


def write_random_weights(folder: Path, content: dict[str, Any]) -> None:
    """As :func:`write_random_checkpoint`, for the content of any ``config.json``."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        if (nano_checkpoint() / name).is_file():
            shutil.copyfile(nano_checkpoint() / name, folder / name)
    shapes = {
        PREFIXES[component] + name: shape
        for component, parts in expected_shapes(parse_config(content)).items()
        for name, shape in parts.items()
    }
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for number, (name, shape) in enumerate(shapes.items()):
        shard[name] = _random(name, shape, generator)
        held = sum(tensor.numel() for tensor in shard.values()) * 2
        if held > SHARD_BYTES or number == len(shapes) - 1:
            file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        values = 1 + 0.1 * values
    elif "embed" in name and len(shape) <= 2:
        values *= 0.3
    else:
        values *= math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.05
    return values.to(torch.bfloat16)
