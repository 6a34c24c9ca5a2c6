"""LLaMA decoder (Touvron et al. 2023) with flat, sequence-major cache tensors.

One definition serves prefill and decode. Keys and values are laid out [T, H_kv, head_dim]
(any leading batch dimensions in front), so that a growing prefix is contiguous and a runtime
appends without a copy. RMSNorm and Softmax run in float32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TextConfig


class RmsNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, divided in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_tables(config: TextConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [max_positions, head_dim], half-split layout.

    Angle of pair i at position p: ``p * theta ** (-2 i / head_dim)`` (Su et al. 2021).
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    inverse = config.rope_theta**-half
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float64)
    angles = torch.outer(positions, inverse).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., S, H, D] by tables [..., S, 1, D]: ``x cos + rotate_half(x) sin``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Grouped-query attention: [..., T, H_kv, D] -> [..., T, H_kv * times, D]."""
    if times == 1:
        return x
    return x.unsqueeze(-2).expand(*x.shape[:-1], times, x.shape[-1]).flatten(-3, -2)


class LlamaAttention(nn.Module):
    """Causal grouped-query attention; returns the new keys and values beside the output."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        new_value = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        query = apply_rotary(query, cos, sin) * self.head_dim**-0.5
        new_key = apply_rotary(key, cos, sin)
        group = self.heads // self.kv_heads
        keys = repeat_heads(torch.cat([past[0], new_key], dim=-3), group)
        values = repeat_heads(torch.cat([past[1], new_value], dim=-3), group)
        scores = query.transpose(-3, -2) @ keys.transpose(-3, -2).transpose(-2, -1)
        weights = torch.softmax(scores.float() + mask, dim=-1).to(values.dtype)
        attended = (weights @ values.transpose(-3, -2)).transpose(-3, -2).flatten(-2)
        return self.o_proj(attended), new_key, new_value


class LlamaMlp(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMlp(config)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., S, hidden] -> the same, and new keys and values [..., S, H_kv, head_dim].

        Args:
            cos, sin: [..., S, 1, head_dim] in ``x``'s dtype.
            mask: float32, broadcast over [..., H, S, T + S], 0 where visible.
            past: keys and values [..., T, H_kv, head_dim].
        """
        attended, key, value = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class LlamaModel(nn.Module):
    """Embedding table, blocks, final norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class LlamaDecoder(nn.Module):
    """The decoder of the graph contract: one sequence, prefill and decode alike."""

    MASKED = -1e30
    """Added to the scores of positions that must not be seen (float32)."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rotary_tables(config)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def embed(self, input_ids: Tensor, image_embeds: Tensor) -> Tensor:
        """[S] ids and [I, D] image rows -> [S, D]; id ``vocab_size + i`` is image row i."""
        vocab = self.config.vocab_size
        is_image = (input_ids >= vocab).unsqueeze(-1)
        text = self.model.embed_tokens(input_ids.clamp(max=vocab - 1))
        image = image_embeds.index_select(0, (input_ids - vocab).clamp(min=0))
        return torch.where(is_image, image.to(text.dtype), text)

    def rotary_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables at integer positions [..., S], each [..., S, 1, head_dim] in weight dtype."""
        dtype = self.model.norm.weight.dtype
        cos = F.embedding(positions, self.rotary_cos).unsqueeze(-2).to(dtype)
        sin = F.embedding(positions, self.rotary_sin).unsqueeze(-2).to(dtype)
        return cos, sin

    def forward(
        self, input_ids: Tensor, image_embeds: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits of every row, and the new cache rows.

        Args:
            input_ids: int32 or int64 [S]; ``vocab_size + i`` is row i of ``image_embeds``.
            image_embeds: [I, D], I >= 1 (a row of zeros where there is no image).
            past: key and value of layer 0, of layer 1, ...; each [T, H_kv, head_dim], T >= 0.

        Returns:
            ``logits`` float32 [S, V], then each layer's new key and value [S, H_kv, head_dim].
        """
        hidden = self.embed(input_ids, image_embeds)
        new, seen = input_ids.shape[0], past[0].shape[0]
        positions = torch.arange(new, device=input_ids.device) + seen
        columns = torch.arange(seen + new, device=input_ids.device)
        visible = columns <= positions.unsqueeze(-1)
        mask = torch.where(visible, 0.0, self.MASKED)
        cos, sin = self.rotary_at(positions)
        rows: list[Tensor] = []
        for index, layer in enumerate(self.model.layers):
            cache = (past[2 * index], past[2 * index + 1])
            hidden, key, value = layer(hidden, cos, sin, mask, cache)
            rows += [key, value]
        logits = self.lm_head(self.model.norm(hidden)).float()
        return (logits, *rows)
