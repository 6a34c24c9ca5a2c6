"""The optimization profiles that a bundle's three plans get."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .kv_cache import KvForm
from .manifest import Manifest, ModelSpec
from .trt_profiles import ProfileSpec, WeightKind, decoder_profiles, vision_profiles

MAX_IMAGES = 4
"""Images that one call of the vision encoder and one prompt may hold."""

WEIGHT_KINDS: Mapping[str, WeightKind] = {"float32": "fp32", "float16": "fp16"}

_BLOCK_LAYER = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+)")
# The first of a merged projection names it; where they are not merged the others come on top.
_BLOCK_PARTS = ("q_proj", "o_proj", "gate_proj", "down_proj")


def decoder_weight_kind(manifest: Manifest) -> WeightKind:
    """How the decoder's linear layers are stored, by what the compile noted of each."""
    noted = manifest.checks.get("quantization", {}).get("decoder", {}).get("layers", {})
    dtype = manifest.graphs["decoder"].dtype
    return stored_weight_kind(noted, manifest.model.num_layers, dtype)


def stored_weight_kind(
    noted: Mapping[str, Mapping[str, Any]], blocks: int, dtype: str
) -> WeightKind:
    """How a decoder's linear layers are stored.

    ``int4`` if every linear layer of every block is: one block in wider numbers, and a decode
    profile of one row would keep those twice. ``int8`` if any layer is; else the graph's own
    type. The head may differ: its product is not one of a block.

    Args:
        noted: of each quantized layer its ``form``, by name.
        blocks: how many the decoder has.
        dtype: of what is in float.
    """
    forms = {
        (int(match[1]), match[2]): str(layer["form"])
        for name, layer in noted.items()
        if (match := _BLOCK_LAYER.fullmatch(name)) and layer["form"] is not None
    }
    needed = {(block, part) for block in range(blocks) for part in _BLOCK_PARTS}
    if needed <= set(forms) and all(form.startswith("int4") for form in forms.values()):
        return "int4"
    if any(form.startswith("int8") for form in forms.values()):
        return "int8"
    return WEIGHT_KINDS[dtype]


def graph_profiles(
    model: ModelSpec, kind: WeightKind, kv_form: KvForm = "append"
) -> dict[str, tuple[ProfileSpec, ...]]:
    """Optimization profiles of the three graphs, by graph name.

    Args:
        kind: how the decoder's weights are stored.
        kv_form: of the decoder's cache.
    """
    images = vision_profiles(MAX_IMAGES)
    most = min(MAX_IMAGES * model.image_tokens, model.max_positions)
    decoder = decoder_profiles(model.max_positions, model.image_tokens, kind, most, kv_form)
    return {"vision_encoder": images, "projector": images, "decoder": decoder}


def bundle_profiles(manifest: Manifest) -> dict[str, tuple[ProfileSpec, ...]]:
    """Optimization profiles of a bundle's graphs, by graph name."""
    return graph_profiles(manifest.model, decoder_weight_kind(manifest), manifest.kv_form)
