"""ONNX Runtime sessions for judging what quantization does to numbers, not to speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvlm_export.engines.ort_api import LOG_FATAL_ONLY, import_onnxruntime, ort_errors

SETTINGS = {
    # By default ONNX Runtime rounds the inputs of blockwise 4-bit products to 8 bits.
    "session.qdq_matmulnbits_accuracy_level": "0",
    # Waiting threads sleep: these runs are long, and the machine may have other work.
    "session.intra_op.allow_spinning": "0",
}


def open_session(
    model: Any,  # noqa: ANN401
    threads: int | None = None,
    rewritten: bool = True,
) -> Any:  # noqa: ANN401
    """A session on the CPU; one that is given is given back.

    Args:
        model: path of an ONNX file, a serialized model, or an open session.
        threads: for one operator; None means ONNX Runtime's default.
        rewritten: let ONNX Runtime fuse nodes. False runs Q/DQ as it is written, in float32,
            without the saturation of 8-bit kernels.

    Raises:
        EngineError: ONNX Runtime cannot load it.
        MissingPackageError: ONNX Runtime is not installed.
    """
    ort = import_onnxruntime()
    if isinstance(model, ort.InferenceSession):
        return model
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_ALL if rewritten else level.ORT_DISABLE_ALL
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    content = model if isinstance(model, bytes) else str(model)
    name = "in memory" if isinstance(model, bytes) else Path(model).name
    with ort_errors(ort, name, "load"):
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
