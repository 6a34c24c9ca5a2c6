"""What runs on the device: bundles, sessions, the KV cache, pre- and postprocessing.

``VLM`` and its companions are loaded when they are first asked for; importing this package
brings in neither torch, onnx, tensorrt nor onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import Bundle
    from .errors import MvlmError
    from .generation import Answer, AnswerStream
    from .sampling import SamplingParams
    from .timings import Timings
    from .vlm import VLM, ChatSession

__all__ = [
    "VLM",
    "Answer",
    "AnswerStream",
    "Bundle",
    "ChatSession",
    "MvlmError",
    "SamplingParams",
    "Timings",
]

_MODULES = {
    "VLM": "vlm",
    "ChatSession": "vlm",
    "Answer": "generation",
    "AnswerStream": "generation",
    "Timings": "timings",
    "Bundle": "bundle",
    "MvlmError": "errors",
    "SamplingParams": "sampling",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
