"""Small checkpoints with random weights in the published layout, for whichever test needs one.

The tensor names are spelt out here from the published layout, not taken from our modules, so
that a module whose names drift is found.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import ModelConfig, mlp_depth, parse_config, read_config
from mvlm_export.exporter.models.components import build_component
from mvlm_export.exporter.preflight import load_component, preflight

PUBLISHED_VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
FORMATS = ("bin", "bin-sharded", "safetensors", "safetensors-sharded")
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tiny_config_json(**changes: Any) -> dict[str, Any]:
    """A ``config.json`` in the published layout with every size shrunk; ``changes`` go on top.

    Its vision tower is 3 layers on a 4 x 4 grid, its language model 2 layers of 4 heads of 16.
    """
    content: dict[str, Any] = {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "vocab_size": 320,
        "tie_word_embeddings": False,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "vision_tower_type": "clip",
        "mm_hidden_size": 32,
        "mm_projector_type": "ldpnetv2",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    }
    vision = changes.pop("vision_config", {})
    content["vision_config"] |= vision
    return content | changes


def _vision_shapes(config: ModelConfig, prefix: str) -> Shapes:
    vision = config.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    yield f"{prefix}embeddings.class_embedding", (width,)
    yield f"{prefix}embeddings.position_ids", (1, vision.num_patches + 1)
    patch = (width, 3, vision.patch_size, vision.patch_size)
    yield f"{prefix}embeddings.patch_embedding.weight", patch
    yield f"{prefix}embeddings.position_embedding.weight", (vision.num_patches + 1, width)
    norms = ["pre_layrnorm", "post_layernorm"]
    for index in range(vision.num_hidden_layers):
        layer = f"encoder.layers.{index}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{prefix}{layer}.self_attn.{name}.weight", (width, width)
            yield f"{prefix}{layer}.self_attn.{name}.bias", (width,)
        yield f"{prefix}{layer}.mlp.fc1.weight", (inner, width)
        yield f"{prefix}{layer}.mlp.fc1.bias", (inner,)
        yield f"{prefix}{layer}.mlp.fc2.weight", (width, inner)
        yield f"{prefix}{layer}.mlp.fc2.bias", (width,)
    for norm in norms:
        yield f"{prefix}{norm}.weight", (width,)
        yield f"{prefix}{norm}.bias", (width,)


def _linear(name: str, rows: int, columns: int) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _ldp_shapes(channels: int, width: int, prefix: str) -> Shapes:
    """V1's LDP; squeezed channels are a quarter, all test widths being multiples of 32."""
    yield from _linear(f"{prefix}model.mlp.1", width, channels)
    yield from _linear(f"{prefix}model.mlp.3", width, width)
    for index in (1, 2):
        block = f"{prefix}model.mb_block.{index}.block"
        yield f"{block}.0.0.weight", (width, 1, 3, 3)
        yield f"{block}.0.1.weight", (width,)
        yield f"{block}.0.1.bias", (width,)
        yield f"{block}.1.fc1.weight", (width // 4, width, 1, 1)
        yield f"{block}.1.fc1.bias", (width // 4,)
        yield f"{block}.1.fc2.weight", (width, width // 4, 1, 1)
        yield f"{block}.1.fc2.bias", (width,)
        yield f"{block}.2.0.weight", (width, width, 1, 1)
        yield f"{block}.2.1.weight", (width,)
        yield f"{block}.2.1.bias", (width,)


def _projector_shapes(config: ModelConfig) -> Shapes:
    kind, prefix = config.projector_type, "model.mm_projector."
    channels, width = config.vision.hidden_size, config.text.hidden_size
    depth = mlp_depth(kind)
    if kind == "ldpnet":
        yield from _ldp_shapes(channels, width, prefix)
    elif kind == "linear":
        yield from _linear("model.mm_projector", width, channels)
    elif depth is not None:
        for index in range(depth):
            yield from _linear(f"{prefix}{2 * index}", width, width if index else channels)
    else:
        yield from _linear(f"{prefix}mlp.mlp.0", width, channels)
        yield from _linear(f"{prefix}mlp.mlp.2", width, width)
        if kind in ("ldpnetv2", "ldpnetv2_nopool"):
            yield f"{prefix}peg.peg.0.weight", (width, 1, 3, 3)
            yield f"{prefix}peg.peg.0.bias", (width,)
        if kind == "pw2_pool_pos":
            yield f"{prefix}pos.weight", (config.vision.num_patches // 4, width)


def _decoder_shapes(config: ModelConfig) -> Shapes:
    text = config.text
    width, inner, head = text.hidden_size, text.intermediate_size, text.head_dim
    kv_width = text.num_key_value_heads * head
    yield "model.embed_tokens.weight", (text.vocab_size, width)
    for index in range(text.num_hidden_layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.self_attn.rotary_emb.inv_freq", (head // 2,)
        yield f"{layer}.self_attn.q_proj.weight", (width, width)
        yield f"{layer}.self_attn.k_proj.weight", (kv_width, width)
        yield f"{layer}.self_attn.v_proj.weight", (kv_width, width)
        yield f"{layer}.self_attn.o_proj.weight", (width, width)
        yield f"{layer}.mlp.gate_proj.weight", (inner, width)
        yield f"{layer}.mlp.up_proj.weight", (inner, width)
        yield f"{layer}.mlp.down_proj.weight", (width, inner)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    if not text.tie_word_embeddings:
        yield "lm_head.weight", (text.vocab_size, width)


def published_shapes(
    config: ModelConfig, vision_prefix: str = PUBLISHED_VISION_PREFIX
) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint of this geometry, old buffers included."""
    return {
        **dict(_decoder_shapes(config)),
        **dict(_vision_shapes(config, vision_prefix)),
        **dict(_projector_shapes(config)),
    }


def random_tensor(
    name: str, shape: tuple[int, ...], config: ModelConfig, dtype: torch.dtype, seed: int
) -> Tensor:
    """The value of one tensor; depends on its name and the seed, not on the file format.

    Matrices have a standard deviation of fan-in ** -0.5, norm weights are near 1, biases and
    embeddings small, so that activations keep their size through the layers.
    """
    if name.endswith("position_ids"):
        return torch.arange(shape[-1]).unsqueeze(0)
    if name.endswith("inv_freq"):
        steps = torch.arange(0, config.text.head_dim, 2).float() / config.text.head_dim
        return config.text.rope_theta**-steps
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    values = torch.randn(shape, generator=generator)
    is_norm = "norm" in name or ".block.0.1." in name or ".block.2.1." in name
    if is_norm and name.endswith("weight"):
        values = 1 + 0.1 * values
    elif "embed_tokens" in name or ("embedding" in name and len(shape) <= 2):
        values *= 0.3
    elif len(shape) >= 2:
        values *= math.prod(shape[1:]) ** -0.5
    else:
        values *= 0.05
    return values.to(dtype)


def _shards(
    shapes: dict[str, tuple[int, ...]], limit: int, dtype: torch.dtype
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_random_checkpoint(
    folder: Path,
    config_json: dict[str, Any],
    fmt: str = "bin",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    vision_prefix: str = PUBLISHED_VISION_PREFIX,
    max_shard_bytes: int | None = None,
) -> ModelConfig:
    """Write a checkpoint with random weights and return its config.

    Args:
        folder: made if need be.
        config_json: content of ``config.json``; see ``tiny_config_json`` and
            ``published_config_json``.
        fmt: one of ``FORMATS``. Sharded ones hold one shard in memory at a time.
        vision_prefix: what stands before the vision tower's names.
        max_shard_bytes: size of a shard; by default 512 MiB or a third of the whole.
    """
    config = parse_config(config_json)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json, indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    shapes = published_shapes(config, vision_prefix)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    kind, _, sharded = fmt.partition("-")
    limit = max_shard_bytes or min(512 << 20, total // 3)
    shards = _shards(shapes, limit if sharded else total + 1, dtype)
    stem, suffix = {
        "bin": ("pytorch_model", ".bin"),
        "safetensors": ("model", ".safetensors"),
    }[kind]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if sharded else ""
        path = folder / f"{stem}{part}{suffix}"
        tensors = {n: random_tensor(n, shapes[n], config, dtype, seed) for n in names}
        if kind == "bin":
            torch.save(tensors, path)
        else:
            save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, path.name)
    if sharded:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return config


class LoadedComponent(NamedTuple):
    """A component with random weights, and the checkpoint that they were read from."""

    config: ModelConfig
    checkpoint: Checkpoint
    module: nn.Module


def load_random_component(
    folder: Path, component: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> LoadedComponent:
    """Write a tiny checkpoint and read one component of it, built on meta, by our own code.

    Args:
        folder: where the checkpoint is written.
        component: ``vision_encoder``, ``projector`` or ``decoder``.
        dtype: what the weights (stored as bfloat16) are cast to.
        changes: go into ``tiny_config_json``.
    """
    write_random_checkpoint(folder, tiny_config_json(**changes), "bin-sharded", seed=11)
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    report = preflight(checkpoint, config)
    report.raise_if_failed()
    with torch.device("meta"):
        module = build_component(component, config)
    load_component(module, component, report.weight_map, checkpoint, dtype)
    return LoadedComponent(config, checkpoint, module.eval())
