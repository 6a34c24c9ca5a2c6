"""The same model in PyTorch, as one would serve it there: eager, or by ``torch.compile``.

The weights are those of our own PyTorch definition (``exporter/models``), loaded from the
checkpoint. What differs is what a fair peer has: keys and values in one cache of fixed size
that is written in place, so that a decode step has fixed shapes and a CUDA graph can hold it,
and attention by ``scaled_dot_product_attention``. Prefill attends to its own rows alone.

The protocol is that of ``mvlm bench``: one picture, one question, a fixed number of greedy
tokens, each of which is read back to the host, as an answer that is streamed must.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.nn import functional as F

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.image_processor import preprocess
from mvlm_export.engines.prompt import Conversation, get_template, tokenize_prompt
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.assemble import image_processor
from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import read_config
from mvlm_export.exporter.models.clip_vision import ClipAttention
from mvlm_export.exporter.models.components import COMPONENTS, build_component
from mvlm_export.exporter.models.llama import LlamaDecoder, apply_rotary
from mvlm_export.exporter.preflight import load_component, preflight

CACHE_STEP = 64
"""The cache has the rows that prompt and answer take, rounded up to a multiple of this."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}


class FusedClipAttention(nn.Module):
    """:class:`ClipAttention` with the same layers and the fused kernel."""

    def __init__(self, plain: ClipAttention) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        plain = self.plain
        query, key, value = (
            layer(x).unflatten(-1, (plain.heads, plain.head_dim)).transpose(1, 2)
            for layer in (plain.q_proj, plain.k_proj, plain.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return plain.out_proj(attended.transpose(1, 2).flatten(2))


class StaticDecoder(nn.Module):
    """The decoder's layers on a cache of fixed size; both methods give the likeliest token.

    Args:
        decoder: with its weights.
        rows: most positions of prompt and answer together.
    """

    def __init__(self, decoder: LlamaDecoder, rows: int) -> None:
        super().__init__()
        self.decoder = decoder
        text, weight = decoder.config, decoder.lm_head.weight
        shape = (1, text.num_key_value_heads, rows, text.head_dim)
        self.grouped = text.num_key_value_heads != text.num_attention_heads
        for index in range(2 * text.num_hidden_layers):
            empty = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            torch._dynamo.mark_static_address(empty)  # or no CUDA graph may write to it
            self.register_buffer(f"cache_{index}", empty, persistent=False)

    def prefill(self, ids: Tensor, image_embeds: Tensor) -> Tensor:
        """[S] ids on an empty cache -> int64 [1], the token behind them."""
        positions = torch.arange(len(ids), device=ids.device)
        hidden = self.decoder.embed(ids, image_embeds)
        return self._run(hidden, positions, None)

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """int64 [1] token at int64 [1] position -> int64 [1], the next."""
        rows = self.cache_0.shape[2]
        visible = torch.arange(rows, device=token.device) <= position
        return self._run(self.decoder.model.embed_tokens(token), position, visible[None, None])

    def _run(self, hidden: Tensor, positions: Tensor, visible: Tensor | None) -> Tensor:
        model = self.decoder.model
        cos, sin = self.decoder.rotary_at(positions)
        for index, layer in enumerate(model.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            query = attention.q_proj(x).unflatten(-1, (attention.heads, attention.head_dim))
            key = attention.k_proj(x).unflatten(-1, (attention.kv_heads, attention.head_dim))
            value = attention.v_proj(x).unflatten(-1, (attention.kv_heads, attention.head_dim))
            query, key, value = (
                part.transpose(0, 1)[None]
                for part in (apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value)
            )
            keys = self.get_buffer(f"cache_{2 * index}")
            values = self.get_buffer(f"cache_{2 * index + 1}")
            keys.index_copy_(2, positions, key)
            values.index_copy_(2, positions, value)
            given = (key, value) if visible is None else (keys, values)
            attended = F.scaled_dot_product_attention(
                query, *given, visible, is_causal=visible is None, enable_gqa=self.grouped
            )
            hidden = hidden + attention.o_proj(attended[0].transpose(0, 1).flatten(-2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.decoder.lm_head(model.norm(hidden[-1:])).argmax(-1)


class TorchPeer:
    """A checkpoint ready to answer one question.

    Args:
        checkpoint: its folder.
        image: the picture.
        question: the words.
        new_tokens: of each answer.
        device: "cuda" or "cpu".
        dtype: a key of ``DTYPES``.
        compiled: by ``torch.compile``, with CUDA graphs where there is a GPU
            (``reduce-overhead``); else eager.

    Raises:
        CheckpointError: the folder cannot be used.
        InputError: prompt and answer take more positions than the model has.
    """

    def __init__(
        self,
        checkpoint: Path,
        image: Path,
        question: str,
        new_tokens: int,
        device: str,
        dtype: str,
        compiled: bool,
    ) -> None:
        started = time.perf_counter()
        self.image, self.new_tokens = image, new_tokens
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        config = read_config(checkpoint)
        self.processor = image_processor(checkpoint, config)
        text = Conversation(get_template("v1")).ask(question, images=1).render()
        tokenizer = LlamaTokenizer.from_folder(checkpoint)
        counts = [config.image_tokens]
        self.prompt = tokenize_prompt(text, tokenizer, config.text.vocab_size, counts).ids
        length = len(self.prompt) + new_tokens
        if length > config.text.max_position_embeddings:
            raise InputError(
                f"Prompt and answer take {length} positions, but the model has "
                f"{config.text.max_position_embeddings}. Ask for fewer tokens."
            )
        modules = self._load(checkpoint)
        rows = -(-length // CACHE_STEP) * CACHE_STEP
        decoder = StaticDecoder(modules["decoder"], rows).eval()
        wrap = _compile if compiled else _leave
        self._encode = wrap(modules["vision_encoder"])
        self._project = wrap(modules["projector"])
        self._prefill, self._decode = wrap(decoder.prefill), wrap(decoder.decode)
        self.load_seconds = time.perf_counter() - started

    def _load(self, folder: Path) -> dict[str, Any]:
        config, checkpoint = read_config(folder), Checkpoint.open(folder)
        report = preflight(checkpoint, config, None, allow_unknown=True)
        report.raise_if_failed()
        modules: dict[str, Any] = {}
        for name in COMPONENTS:
            with torch.device("meta"):
                module = build_component(name, config)
            load_component(module, name, report.weight_map, checkpoint, self.dtype)
            modules[name] = module.to(self.device).eval().requires_grad_(False)
        for layer in modules["vision_encoder"].encoder.layers:
            layer.self_attn = FusedClipAttention(layer.self_attn)
        return modules

    @torch.inference_mode()
    def answer(self) -> dict[str, Any]:
        """One answer, nothing kept from the one before.

        Returns:
            ``seconds`` by phase as ``mvlm bench`` names them, ``decode_tokens_per_second``,
            ``tokens_per_second`` and ``ids``.
        """
        seconds: dict[str, float] = {}
        begun = time.perf_counter()
        with self._phase(seconds, "preprocess"):
            pixels = torch.from_numpy(preprocess(self.image, self.processor))
            pixels = pixels.to(self.device, self.dtype)
        with self._phase(seconds, "vision"):
            features = self._encode(pixels)
        with self._phase(seconds, "projector"):
            embeds = self._project(features).flatten(0, 1)
        with self._phase(seconds, "prefill"):
            ids = torch.from_numpy(self.prompt.astype(np.int64)).to(self.device)
            token = self._prefill(ids, embeds)
            answer = [int(token)]
        seconds["time_to_first_token"] = time.perf_counter() - begun
        position = torch.full((1,), len(self.prompt), device=self.device)
        with self._phase(seconds, "decode"):
            while len(answer) < self.new_tokens:
                token = self._decode(token, position)
                position += 1
                answer.append(int(token))
        seconds["total"] = time.perf_counter() - begun
        return {
            "seconds": seconds,
            "decode_tokens_per_second": (len(answer) - 1) / seconds["decode"],
            "tokens_per_second": len(answer) / seconds["total"],
            "ids": answer,
        }

    def describe(self) -> dict[str, Any]:
        """What is worth knowing beside the timings, once it has answered."""
        found: dict[str, Any] = {
            "load": self.load_seconds,
            "dtype": str(self.dtype),
            "prompt_tokens": len(self.prompt),
            "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
        }
        if self.device.type == "cuda":
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        return found

    @contextmanager
    def _phase(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - started


def _leave(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def call(*tensors: Tensor) -> Tensor:
        # What a CUDA graph gives is overwritten by the next graph's run.
        return compiled(*tensors).clone()

    return call
