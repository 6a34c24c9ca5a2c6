"""The PyTorch model of a checkpoint in float32: what every compiled graph is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.kv_cache import CacheArray

from .checkpoint import Checkpoint
from .config import ModelConfig, read_config
from .models.components import COMPONENTS, build_component
from .models.llama import LlamaDecoder
from .preflight import WeightMap, load_component, preflight

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Step:
    """What the decoder gives for one call: logits [S, V] and new cache rows per tensor."""

    logits: FloatArray
    rows: list[CacheArray]


@dataclass(frozen=True)
class ForcedRun:
    """A prompt, then a fixed continuation fed token by token.

    Attributes:
        prefill: the prompt in one call.
        decode: one call per continuation token.
    """

    prefill: Step
    decode: list[Step]


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """PyTorch with so many threads for one operator inside the block; None changes nothing.

    Raises:
        InputError: ``threads`` is below 1.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}; give 1 or more, or None for the default.")
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


class ReferenceModel:
    """The components of a checkpoint in float32.

    They are loaded when first used and can be released, so that a large checkpoint needs the
    memory of one component at a time.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, weights: WeightMap) -> None:
        self.folder = folder
        self.config: ModelConfig = read_config(folder)
        self._checkpoint: Checkpoint | None = checkpoint
        self._weights = weights

    @classmethod
    def open(cls, folder: Path) -> ReferenceModel:
        """Open a checkpoint folder; tensors the model has no place for do not matter here.

        Raises:
            CheckpointError: it cannot be read, or lacks what the model needs.
        """
        checkpoint = Checkpoint.open(folder)
        report = preflight(checkpoint, read_config(folder), None, allow_unknown=True)
        report.raise_if_failed()
        return cls(folder, checkpoint, report.weight_map)

    def _load(self, name: str) -> nn.Module:
        with torch.device("meta"):
            module = build_component(name, self.config)
        if self._checkpoint is None:
            self._checkpoint = Checkpoint.open(self.folder)
        load_component(module, name, self._weights, self._checkpoint, torch.float32)
        return module.eval().requires_grad_(False)

    @cached_property
    def vision_encoder(self) -> nn.Module:
        """Pictures to features."""
        return self._load("vision_encoder")

    @cached_property
    def projector(self) -> nn.Module:
        """Features to the decoder's image rows."""
        return self._load("projector")

    @cached_property
    def decoder(self) -> LlamaDecoder:
        """Ids and image rows to logits and new cache rows."""
        module = self._load("decoder")
        assert isinstance(module, LlamaDecoder)
        return module

    def release(self) -> None:
        """Drop the memory of components and weight files; both load again when next used."""
        for name in COMPONENTS:
            self.__dict__.pop(name, None)
        self._checkpoint = None

    @torch.inference_mode()
    def image_features(self, pixel_values: FloatArray) -> FloatArray:
        """float32 [B, 3, H, W] -> [B, N, C]."""
        features: FloatArray = self.vision_encoder(torch.from_numpy(pixel_values)).numpy()
        return features

    @torch.inference_mode()
    def image_embeds(self, image_features: FloatArray) -> FloatArray:
        """float32 [B, N, C] -> [B, tokens, D]."""
        embeds: FloatArray = self.projector(torch.from_numpy(image_features)).numpy()
        return embeds

    def _empty_cache(self) -> list[Tensor]:
        text = self.config.text
        shape = (0, text.num_key_value_heads, text.head_dim)
        return [torch.zeros(shape) for _ in range(2 * text.num_hidden_layers)]

    def _step(self, ids: IdArray, embeds: Tensor, cache: list[Tensor]) -> Step:
        logits, *rows = self.decoder(torch.from_numpy(ids), embeds, cache)
        for index, row in enumerate(rows):
            cache[index] = torch.cat([cache[index], row])
        return Step(logits.numpy(), [row.numpy() for row in rows])

    @torch.inference_mode()
    def greedy_run(
        self,
        prompt: IdArray,
        embeds: FloatArray,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> tuple[list[int], ForcedRun]:
        """Greedy answer ids (the stop id included when it comes) and the run that gave them.

        The answer ends at a stop id, after ``max_tokens``, or where the model has no position
        left. The run has one decode step fewer than the answer has tokens: the last is not
        fed.

        Raises:
            InputError: the prompt leaves no position for the answer.
        """
        positions = self.config.text.max_position_embeddings
        limit = min(max_tokens, positions - len(prompt))
        if limit < 1:
            raise InputError(
                f"The prompt takes {len(prompt)} positions and the answer may have "
                f"{max_tokens} tokens, but the model has {positions} positions: no token "
                "fits. Shorten the question, or allow at least one token."
            )
        cache, rows = self._empty_cache(), torch.from_numpy(embeds)
        step = prefill = self._step(prompt, rows, cache)
        answer: list[int] = []
        decode: list[Step] = []
        while True:
            token = int(step.logits[-1].argmax())
            answer.append(token)
            if token in stop_ids or len(answer) == limit:
                return answer, ForcedRun(prefill, decode)
            step = self._step(np.array([token], np.int32), rows, cache)
            decode.append(step)
