"""ONNX Runtime sessions as the peers' own guides set them: so many threads, all fusions."""

from __future__ import annotations

from typing import Any

import onnxruntime


def open_session(path: str, threads: int) -> Any:  # noqa: ANN401
    """A session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
