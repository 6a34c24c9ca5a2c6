"""A bundle of ours, through the runtime's own sessions; and whole, through ``VLM``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from worker_protocol import POSITIONS, PROMPT, Worker, picture, serve

from mvlm_export.engines.backends import open_backend
from mvlm_export.engines.bench import bytes_per_token
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.image_processor import (
    ImageProcessorConfig,
    encoder_input,
    preprocess_uint8,
)
from mvlm_export.engines.sampling import SamplingParams
from mvlm_export.engines.session import (
    Backend,
    BackendOptions,
    DecoderSession,
    FloatArray,
    GraphSession,
)
from mvlm_export.engines.vlm import VLM


class KeptSessions:
    """A backend whose sessions are opened once and shared by all who ask."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._graphs: dict[str, GraphSession] = {}
        self._decoder: DecoderSession | None = None

    def open_graph(self, name: str) -> GraphSession:
        if name not in self._graphs:
            self._graphs[name] = self._backend.open_graph(name)
        return self._graphs[name]

    def open_decoder(self) -> DecoderSession:
        if self._decoder is None:
            self._decoder = self._backend.open_decoder()
        return self._decoder


class OurWorker(Worker):
    """All three graphs of a bundle."""

    sees = True
    speaks = True

    def load(self) -> None:
        started = time.perf_counter()
        bundle = Bundle.load(self.options["bundle"], verify=False)
        options = BackendOptions(threads=self.threads)
        backend = KeptSessions(open_backend(bundle, "onnxruntime", options))
        self._vlm = VLM(bundle, backend, started, use_prefix=False, reuse=False)
        model = bundle.manifest.model
        self._vision = backend.open_graph("vision_encoder")
        self._projector = backend.open_graph("projector")
        self._decoder = backend.open_decoder()
        self._cache = self._decoder.new_cache()
        config = ImageProcessorConfig.from_json(model.image_processor)
        pixels = preprocess_uint8(picture(), config)
        self._pixels = encoder_input(pixels, config, bundle.manifest.pixel_dtype)
        self._rows: FloatArray = np.zeros((1, model.hidden_size), np.float32)
        self._features: FloatArray = self._rows
        self._logits = np.zeros(1, np.float32)

    def facts(self) -> dict[str, Any]:
        import onnxruntime

        bundle = self._vlm.bundle
        fixed = bytes_per_token(bundle, 0)
        row = (bytes_per_token(bundle, 1000) or 0) - (fixed or 0)
        return {
            "weights_read": fixed,
            "kv_row_bytes": row / 1000,
            "versions": {"onnxruntime": onnxruntime.__version__},
        }

    def encode(self) -> None:
        self._features = self._vision.run(self._pixels)

    def project(self) -> None:
        self._rows = self._projector.run(self._features)[0]

    def prefill(self, ids: np.ndarray[Any, Any]) -> int:
        self._cache.truncate(0)
        self._logits = self._decoder.append(self._cache, ids.astype(np.int32), self._rows)
        return int(self._logits.argmax())

    def step(self, token: int) -> int:
        ids = np.array([token], np.int32)
        if self._decoder.chooses_greedily:
            return self._decoder.append_greedy(self._cache, ids, self._rows)
        return int(self._decoder.append(self._cache, ids, self._rows).argmax())

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        return {"image_rows": np.asarray(self._rows, np.float32), "logits": self._logits}

    def whole_answer(self, tokens: int) -> float | None:
        """A picture and a question of ``PROMPT`` rows in all, by ``VLM.generate``."""
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, draft_tokens=0)
        if len(self._vlm.tokenize(self._asked(""))) + tokens > POSITIONS:
            return None
        question = self._question()
        answered = self._vlm.generate([picture()], question, params)
        return float(answered.timings.total)

    def _asked(self, question: str) -> Any:  # noqa: ANN401
        return self._vlm.conversation().ask(question, 1)

    def _question(self) -> str:
        """One that makes a prompt of ``PROMPT`` rows, or as near below as words come."""
        question = ""
        for word in ("what do you see here? " * PROMPT).split():
            longer = f"{question} {word}".strip()
            if len(self._vlm.tokenize(self._asked(longer))) > PROMPT:
                break
            question = longer
        return question


if __name__ == "__main__":
    serve(OurWorker)
