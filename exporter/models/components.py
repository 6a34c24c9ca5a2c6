"""The three components that a MobileVLM is compiled as."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..config import ModelConfig
from .clip_vision import ClipVisionEncoder
from .llama import LlamaDecoder
from .projectors import build_projector

_BUILDERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "vision_encoder": lambda c: ClipVisionEncoder(
        c.vision, c.vision_layers_used, keep_class_token=c.select_feature == "cls_patch"
    ),
    "projector": build_projector,
    "decoder": lambda c: LlamaDecoder(c.text),
}

COMPONENTS = tuple(_BUILDERS)
"""Names of the components, in the order that data flows."""


def build_component(name: str, config: ModelConfig) -> nn.Module:
    """One of ``COMPONENTS`` with the weights of its initialisation, on the default device."""
    return _BUILDERS[name](config)
