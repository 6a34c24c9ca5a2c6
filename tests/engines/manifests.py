"""A small manifest that holds together, for tests that need no graph files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mvlm_export.engines.image_processor import ImageProcessorConfig
from mvlm_export.engines.kv_cache import KvForm
from mvlm_export.engines.manifest import (
    GRAPHS,
    GraphSpec,
    Manifest,
    ModelSpec,
    TensorSpec,
    graph_tensors,
)

MODEL = ModelSpec(
    name="tiny",
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_positions=128,
    image_tokens=4,
    stop_ids=(2, 3),
    template="v1",
    image_processor=ImageProcessorConfig(image_size=16).to_json(),
)
_SHAPES: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "pixel_values": ("float32", ("B", 3, 16, 16)),
    "image_features": ("float32", ("B", 16, 6)),
    "input_ids": ("int32", ("S",)),
    "past_length": ("int64", (1,)),
    "logits": ("float32", ("S", MODEL.vocab_size)),
}


def _tensor(name: str, graph: str) -> TensorSpec:
    if name == "image_embeds":
        width = MODEL.hidden_size
        shape = ("I", width) if graph == "decoder" else ("B", MODEL.image_tokens, width)
        return TensorSpec(name, "float32", shape)
    rows = "T" if name.startswith("past") else "S"
    cache = ("float32", (rows, MODEL.num_key_value_heads, MODEL.head_dim))
    return TensorSpec(name, *_SHAPES.get(name, cache))


def _graph(name: str, kv_form: KvForm) -> GraphSpec:
    inputs, outputs = (
        tuple(_tensor(tensor, name) for tensor in names)
        for names in graph_tensors(name, MODEL.num_layers, kv_form)
    )
    return GraphSpec(f"{name}/model.onnx", "float32", inputs, outputs)


def tiny_manifest(**changes: Any) -> Manifest:
    """Three graphs of a model of two layers for ``cpu``; ``changes`` are its fields."""
    graphs = {name: _graph(name, changes.get("kv_form", "append")) for name in GRAPHS}
    return replace(Manifest(MODEL, "cpu", "fp32", graphs), **changes)
