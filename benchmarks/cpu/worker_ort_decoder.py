"""ONNX Runtime GenAI's graph, driven by plain ONNX Runtime: one cache, bound in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ort_options import open_session
from worker_protocol import POSITIONS, Worker, serve


class OrtDecoderWorker(Worker):
    """Past and present of each layer are one buffer, so that no row is copied."""

    speaks = True

    def load(self) -> None:
        folder = Path(self.options["folder"])
        self._sizes = json.loads((folder / "sizes.json").read_text())
        shape = [1, self._sizes["heads"], POSITIONS, self._sizes["width"]]
        self._session = open_session(str(folder / "model.onnx"), self.threads)
        inputs = {tensor.name: tensor for tensor in self._session.get_inputs()}
        self._binding = self._session.io_binding()
        self._caches = []
        for name, tensor in inputs.items():
            if not name.startswith("past_key_values."):
                continue
            dtype = np.float16 if "float16" in tensor.type else np.float32
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            self._binding.bind_ortvalue_input(name, cache)
            present = name.replace("past_key_values.", "present.")
            self._binding.bind_ortvalue_output(present, cache)
            self._caches.append(cache)
        self._has_positions = "position_ids" in inputs
        self._length = 0
        self._mask = np.ones((1, POSITIONS), np.int64)
        self._kept: list[Any] = []

    def facts(self) -> dict[str, Any]:
        return {key: self._sizes[key] for key in ("weights_read", "kv_row_bytes", "versions")}

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        self._length = 0
        self._logits = self._run(ids[np.newaxis]).copy()
        return int(self._logits.argmax())

    def step(self, token: int) -> int:
        return int(self._run(np.array([[token]], np.int64)).argmax())

    def _run(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        past, self._length = self._length, self._length + ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": self._mask[:, : self._length].copy()}
        if self._has_positions:
            feeds["position_ids"] = np.arange(past, self._length)[np.newaxis]
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(self._binding)
        logits = self._binding.get_outputs()[self._logits_index].numpy()
        last: np.ndarray[Any, Any] = logits[0, -1]
        return last

    @property
    def _logits_index(self) -> int:
        """Outputs come in the order in which they were bound first."""
        return len(self._caches)

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        return {"logits": self._logits.astype(np.float32)}


if __name__ == "__main__":
    serve(OrtDecoderWorker)
