"""CLIP vision transformer (Radford et al. 2021), cut after the hidden state that is used.

Submodules carry the names of the published checkpoints (``pre_layrnorm`` so spelt), so a
checkpoint loads by name. Attention is written out as MatMul, Softmax, MatMul: the form that
every TensorRT version reads and fuses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import VisionConfig


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, CLIP's own approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipAttention(nn.Module):
    """Multi-head self-attention with biases; [B, N, C] -> [B, N, C]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query = self._split(self.q_proj(x)) * self.head_dim**-0.5
        key = self._split(self.k_proj(x)).transpose(-1, -2)
        value = self._split(self.v_proj(x))
        weights = torch.softmax((query @ key).float(), dim=-1).to(value.dtype)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


class ClipMlp(nn.Module):
    """Two linear layers with CLIP's activation between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = ClipAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ClipMlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipEmbeddings(nn.Module):
    """Patch convolution without bias, class token, learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(config.num_patches + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class ClipEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: VisionConfig, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(layers))


class ClipVisionEncoder(nn.Module):
    """``pixel_values`` [B, 3, image, image] -> ``image_features`` [B, N, C].

    Args:
        config: geometry of the tower.
        layers: blocks to run, ``ModelConfig.vision_layers_used``; what comes after the
            selected hidden state (the last block, ``post_layernorm``) is never built.
        keep_class_token: True for ``select_feature == "cls_patch"``.
    """

    def __init__(
        self, config: VisionConfig, layers: int | None = None, keep_class_token: bool = False
    ) -> None:
        super().__init__()
        depth = config.num_hidden_layers if layers is None else layers
        self.keep_class_token = keep_class_token
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = ClipEncoder(config, depth)

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden if self.keep_class_token else hidden[:, 1:]
