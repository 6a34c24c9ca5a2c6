"""PyTorch: the definition that our graphs are captured from, eager or compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker_protocol import Worker, picture, serve

from mvlm_export.engines.image_processor import ImageProcessorConfig, preprocess
from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import read_config
from mvlm_export.exporter.models.components import build_component
from mvlm_export.exporter.preflight import load_component, preflight


class TorchWorker(Worker):
    """Encoder and projector, decoder, or all three in one dtype.

    Options:
        graphs: names of the components.
        dtype: ``float32`` or ``bfloat16``.
        compile: by ``torch.compile``.
    """

    def load(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_grad_enabled(False)
        self._dtype = getattr(torch, self.options["dtype"])
        folder = Path(self.options["checkpoint"])
        self._config = read_config(folder)
        checkpoint = Checkpoint.open(folder)
        report = preflight(checkpoint, self._config, None, allow_unknown=True)
        report.raise_if_failed()
        self._modules: dict[str, Any] = {}
        for name in self.options["graphs"]:
            with torch.device("meta"):
                module = build_component(name, self._config)
            load_component(module, name, report.weight_map, checkpoint, self._dtype)
            module = module.eval().requires_grad_(False)
            if self.options["compile"]:
                module.compile()
            self._modules[name] = module
        self.sees = "vision_encoder" in self._modules
        self.speaks = "decoder" in self._modules
        pixels = preprocess(picture(), ImageProcessorConfig())
        self._pixels = torch.from_numpy(pixels).to(self._dtype).reshape(1, *pixels.shape[-3:])
        self._no_rows = torch.zeros(1, self._config.text.hidden_size, dtype=self._dtype)
        self._rows = self._features = self._no_rows
        self._cache: list[torch.Tensor] = []

    def facts(self) -> dict[str, Any]:
        versions = {"torch": torch.__version__}
        if not self.speaks:
            return {"versions": versions}
        text, size = self._config.text, self._dtype.itemsize
        decoder = self._modules["decoder"]
        table = decoder.model.embed_tokens.weight.numel()
        weights = sum(parameter.numel() for parameter in decoder.parameters()) - table
        row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        return {
            "weights_read": weights * size,
            "kv_row_bytes": row * size,
            "versions": versions,
        }

    def encode(self) -> None:
        self._features = self._modules["vision_encoder"](self._pixels)

    def project(self) -> None:
        self._rows = self._modules["projector"](self._features)

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        text = self._config.text
        shape = (0, text.num_key_value_heads, text.head_dim)
        empty = torch.zeros(shape, dtype=self._dtype)
        self._cache = [empty for _ in range(2 * text.num_hidden_layers)]
        self._logits = self._run(torch.from_numpy(ids))
        return int(self._logits.argmax())

    def step(self, token: int) -> int:
        return int(self._run(torch.tensor([token])).argmax())

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        logits, *rows = self._modules["decoder"](ids, self._no_rows, self._cache)
        self._cache = [torch.cat(pair) for pair in zip(self._cache, rows, strict=True)]
        last: torch.Tensor = logits[-1]
        return last

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        found = {}
        if self.sees:
            found["image_rows"] = self._rows[0].float().numpy()
        if self.speaks:
            found["logits"] = self._logits.float().numpy()
        return found


if __name__ == "__main__":
    serve(TorchWorker)
