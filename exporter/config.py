"""The geometry of a MobileVLM checkpoint, read from its ``config.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_export.engines.errors import CheckpointError

PROJECTORS = (
    "ldpnetv2",
    "ldpnetv2_nopool",
    "ldpnet",
    "linear",
    "pw2",
    "pw2_pool",
    "pw2_pool_pos",
)
"""Projector types by name; ``mlpNx_gelu`` (N >= 1) is understood as well."""

_MLP = re.compile(r"^mlp([1-9]\d*)x_gelu$")


def mlp_depth(projector_type: str) -> int | None:
    """Number of linear layers of an ``mlpNx_gelu`` projector, None for any other type."""
    match = _MLP.match(projector_type)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer; the defaults are ViT-L/14 at 336 pixels."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """A whole MobileVLM: vision tower, projector, language model.

    Attributes:
        select_layer: index into CLIP's hidden states (0 is the embeddings' output), -2 as
            published: the output of the last layer but one.
        select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.
        dtype: dtype of the checkpoint's tensors as config.json states it.
    """

    vision: VisionConfig
    text: TextConfig
    projector_type: str = "ldpnetv2"
    select_layer: int = -2
    select_feature: str = "patch"
    image_aspect_ratio: str = "pad"
    dtype: str = "float16"

    @property
    def vision_layers_used(self) -> int:
        """How many encoder layers the selected hidden state depends on."""
        layers = self.vision.num_hidden_layers
        return self.select_layer if self.select_layer >= 0 else layers + 1 + self.select_layer

    @property
    def image_feature_tokens(self) -> int:
        """Rows of ``image_features`` for one image."""
        return self.vision.num_patches + (self.select_feature == "cls_patch")

    @property
    def pools(self) -> bool:
        """Whether the projector halves the grid along both sides."""
        return self.projector_type in ("ldpnetv2", "ldpnet", "pw2_pool", "pw2_pool_pos")

    @property
    def image_tokens(self) -> int:
        """Rows of ``image_embeds`` for one image (144 for the published models)."""
        if not self.pools:
            return self.image_feature_tokens
        side = (self.vision.grid + 1) // 2 if self.projector_type == "ldpnet" else (
            self.vision.grid // 2
        )
        return side * side
