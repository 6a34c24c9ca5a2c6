"""ONNX Runtime GenAI's own API on the same graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from worker_protocol import PROMPT, Worker, serve

ROOM = 512
"""Most tokens of an answer, prompt left out: the cache is made for both."""


class GenaiWorker(Worker):
    """A ``Generator`` an answer, greedy."""

    speaks = True

    def load(self) -> None:
        config = genai.Config(self.options["folder"])
        config.overlay(
            json.dumps(
                {
                    "model": {
                        "decoder": {"session_options": {"intra_op_num_threads": self.threads}}
                    }
                }
            )
        )
        self._model = genai.Model(config)
        self._generator: Any = None

    def facts(self) -> dict[str, Any]:
        sizes = json.loads((Path(self.options["folder"]) / "sizes.json").read_text())
        return {
            "weights_read": sizes["weights_read"],
            "kv_row_bytes": sizes["kv_row_bytes"],
            "versions": sizes["versions"],
        }

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        self._generator = None
        params = genai.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, max_length=PROMPT + ROOM, min_length=PROMPT + ROOM
        )
        self._generator = genai.Generator(self._model, params)
        self._generator.append_tokens(ids.astype(np.int32)[np.newaxis])
        self._logits = np.array(self._generator.get_output("logits"), np.float32)[0, -1]
        return self._next()

    def step(self, token: int) -> int:
        return self._next()

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        return {"logits": self._logits}


if __name__ == "__main__":
    serve(GenaiWorker)
