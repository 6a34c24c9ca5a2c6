"""ONNX Runtime's INT8 dynamic quantization of our float encoder and projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from ort_options import open_session
from worker_protocol import Worker, picture, serve


class OrtEncoderWorker(Worker):
    """Two graphs of one input and one output."""

    sees = True

    def load(self) -> None:
        folder = Path(self.options["folder"])
        self._vision = open_session(str(folder / "vision_encoder.onnx"), self.threads)
        self._projector = open_session(str(folder / "projector.onnx"), self.threads)
        (wanted,) = self._vision.get_inputs()
        pixels = picture()[np.newaxis]
        if wanted.type == "tensor(float)":
            mean, std = (np.array(values, np.float32) for values in self.options["pixels"])
            pixels = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
        elif list(wanted.shape[1:]) != list(pixels.shape[1:]):
            pixels = pixels.transpose(0, 3, 1, 2)
        self._pixels = np.ascontiguousarray(pixels)
        self._name = wanted.name
        self._features = self._rows = np.zeros(1, np.float32)

    def facts(self) -> dict[str, Any]:
        return {"versions": {"onnxruntime": onnxruntime.__version__}}

    def encode(self) -> None:
        self._features = self._vision.run(None, {self._name: self._pixels})[0]

    def project(self) -> None:
        name = self._projector.get_inputs()[0].name
        self._rows = self._projector.run(None, {name: self._features})[0]

    def outputs(self) -> dict[str, np.ndarray[Any, Any]]:
        return {"image_rows": self._rows[0]}


if __name__ == "__main__":
    serve(OrtEncoderWorker)
