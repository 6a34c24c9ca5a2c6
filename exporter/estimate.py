"""Memory and speed that a target can be expected to give, from a geometry or from real graphs.

``estimate_model`` needs a geometry alone; ``estimate_target`` reads the sizes of a compiled
bundle's weights. Both end in the same memory plan and the same bytes of a decoding step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mvlm_export.calibration.recipe import RECIPES, Recipe
from mvlm_export.engines.kv_cache import KvForm, cache_names
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.memory_plan import GraphLoad, MemoryPlan, ModelSizes, plan_memory
from mvlm_export.engines.plan_profiles import MAX_IMAGES
from mvlm_export.engines.targets import Target
from mvlm_export.passes.pipeline import require_cache_dtype

from .estimate_layers import EMBEDDING as EMBEDDING_LAYER
from .estimate_layers import StoredLayer, store_layers
from .estimate_speed import EFFICIENCY, PAPER, Speed, cache_traffic, estimate_speed
from .geometry import ModelConfig

__all__ = ["EFFICIENCY", "EMBEDDING", "Estimate", "ModelEstimate"]
__all__ += ["estimate_model", "estimate_target"]

EMBEDDING = f"{EMBEDDING_LAYER}.weight"
_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}


@dataclass(frozen=True)
class Estimate:
    """Bytes at run time and the speed that follows.

    Attributes:
        weights: all three graphs' initializers.
        cache: keys and values at ``max_positions``.
        read_weights: decoder weights but the embedding, of which a token reads one row.
        read_per_token: those, and what a half full cache costs.
        memory: of the module, None where it varies.
        fits: whether it can be run there; ``plan`` says whether it can be built there too.
        tokens_per_second: ``EFFICIENCY`` times bandwidth over ``read_per_token``.
        plan: the memory, line by line.
    """

    weights: int
    cache: int
    read_weights: int
    read_per_token: int
    memory: int | None
    fits: bool | None
    efficiency: float
    bandwidth_gb_s: float | None
    tokens_per_second: float | None
    plan: MemoryPlan

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_json()}


@dataclass(frozen=True)
class ModelEstimate:
    """What is expected of a geometry, a recipe and a target; nothing of it is measured.

    Attributes:
        model: name of the geometry or the checkpoint.
        recipe: its name.
        max_length: rows of the cache.
        weights: bytes by graph and form (``fp16``, ``int4 g128``).
        plan: memory to run and to build.
        paper: the paper's tokens/s for this geometry; None for others.
    """

    model: str
    target: Target
    recipe: str
    max_length: int
    weights: Mapping[str, Mapping[str, int]]
    plan: MemoryPlan
    speed: Speed
    paper: float | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all three graphs' weights."""
        return sum(sum(forms.values()) for forms in self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "target": self.target.name,
            "device": self.target.title,
            "recipe": self.recipe,
            "max_length": self.max_length,
            "weights": {graph: dict(forms) for graph, forms in self.weights.items()},
            "weight_bytes": self.weight_bytes,
            "plan": self.plan.to_json(),
            "speed": self.speed.to_json(),
            "bandwidth_gb_s": self.target.bandwidth_gb_s,
            "fp16_tflops": self.target.fp16_tflops,
            "int8_tops": self.target.int8_tops,
            "paper_tokens_per_second": self.paper,
        }


def estimate_model(
    name: str,
    config: ModelConfig,
    recipe: Recipe,
    target: Target,
    max_length: int | None = None,
) -> ModelEstimate:
    """Bytes, products, memory and speed of a geometry.

    Args:
        max_length: rows of the cache; None for the model's own limit.

    Raises:
        InputError: ``max_length`` is beyond the model's limit, or too short for a picture; the
            target has no cache of the recipe's dtype.
    """
    config = config.limited(max_length)
    width = float_width(recipe, target)
    cache_width = _cache_width(recipe, target, width)
    layers = store_layers(config, recipe, width)
    loads = [
        GraphLoad(graph, sum(s.bytes for s in stored), sum(s.four_bit for s in stored))
        for graph, stored in layers.items()
    ]
    sizes = _config_sizes(config, width, cache_width, target.kv_form)
    return ModelEstimate(
        model=name,
        target=target,
        recipe=recipe.name,
        max_length=config.text.max_position_embeddings,
        weights={graph: _by_form(stored, width) for graph, stored in layers.items()},
        plan=plan_memory(loads, sizes, target),
        speed=estimate_speed(config, layers, target, width, cache_width),
        paper=PAPER.get(name),
    )


def float_width(recipe: Recipe, target: Target) -> int:
    """Bytes of what the recipe leaves in float."""
    dtype = recipe.dtype or RECIPES[target.default_recipe].dtype
    return int(np.dtype(dtype).itemsize)


def _cache_width(recipe: Recipe, target: Target, width: int) -> int:
    """Bytes of a value in the cache."""
    dtype = recipe.decoder.kv_cache_dtype
    if dtype is None:
        return width
    require_cache_dtype(dtype, target)
    return int(np.dtype(dtype).itemsize)


def _by_form(stored: tuple[StoredLayer, ...], width: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for layer in stored:
        form = f"fp{8 * width}" if layer.form is None else str(layer.form)
        sizes[form] = sizes.get(form, 0) + layer.bytes
    return sizes


def _config_sizes(
    config: ModelConfig, width: int, cache_width: int, form: KvForm
) -> ModelSizes:
    text, vision = config.text, config.vision
    return ModelSizes(
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        kv_width=text.num_key_value_heads * text.head_dim,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        max_length=text.max_position_embeddings,
        vision_hidden=vision.hidden_size,
        vision_mlp=vision.intermediate_size,
        vision_tokens=vision.num_patches + 1,
        image_rows=config.image_feature_tokens,
        image_size=vision.image_size,
        image_tokens=config.image_tokens,
        images=MAX_IMAGES,
        width=width,
        cache_width=cache_width,
        kv_form=form,
    )


class _GraphFile:
    """Names, shapes and sizes of one graph's initializers; their values are not read."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(str(path), load_external_data=False).graph
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._inputs = {value.name: value.type.tensor_type for value in graph.input}

    def stored(self, name: str) -> int:
        """Bytes of one initializer: two 4-bit values share one."""
        count, kind = int(np.prod(self.shapes[name], dtype=np.int64)), self._types[name]
        bits = _BITS.get(kind)
        if bits is None:
            bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
        return (count * bits + 7) // 8

    @property
    def cache_width(self) -> int:
        """Bytes of a value in a decoder's cache."""
        kind = self._inputs[cache_names("past_key_values", 1)[0]].elem_type
        return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)

    def load(self, name: str) -> GraphLoad:
        four = sum(
            int(np.prod(shape, dtype=np.int64))
            for tensor, shape in self.shapes.items()
            if self._types[tensor] in _BITS
        )
        return GraphLoad(name, sum(map(self.stored, self.shapes)), four)

    def starting(self, prefix: str) -> list[str]:
        """Initializers whose name starts so."""
        return [name for name in self.shapes if name.startswith(prefix)]

    def shape(self, prefix: str) -> tuple[int, ...]:
        """Of the largest initializer whose name starts so: the weight, not its scales."""
        shapes = [self.shapes[name] for name in self.starting(prefix)]
        return max(shapes, key=lambda shape: int(np.prod(shape, dtype=np.int64)))


def estimate_target(
    graphs: Mapping[str, Path], dtype: str, model: ModelSpec, target: Target
) -> Estimate:
    """Read the graphs' initializer sizes (not their values) and do the arithmetic."""
    files = {name: _GraphFile(path) for name, path in graphs.items()}
    loads = [file.load(name) for name, file in files.items()]
    sizes = _graph_sizes(files, dtype, model, target.kv_form)
    plan = plan_memory(loads, sizes, target)
    decoder = files["decoder"]
    table = sum(decoder.stored(name) for name in decoder.starting(EMBEDDING))
    weights = next(load.weights for load in loads if load.name == "decoder") - table
    row = sizes.cache // sizes.max_length
    read = weights + cache_traffic(row, sizes.max_length / 2, sizes.max_length, target.kv_form)
    bandwidth = target.bandwidth_gb_s
    return Estimate(
        weights=sum(load.weights for load in loads),
        cache=sizes.cache,
        read_weights=weights,
        read_per_token=read,
        memory=target.memory_bytes,
        fits=None if plan.available is None else plan.run_bytes <= plan.available,
        efficiency=EFFICIENCY,
        bandwidth_gb_s=bandwidth,
        tokens_per_second=None if bandwidth is None else EFFICIENCY * bandwidth * 1e9 / read,
        plan=plan,
    )


def _graph_sizes(
    files: Mapping[str, _GraphFile], dtype: str, model: ModelSpec, form: KvForm
) -> ModelSizes:
    vision = files["vision_encoder"]
    tokens, hidden = vision.shape("embeddings.position_embedding.weight")
    return ModelSizes(
        hidden=model.hidden_size,
        ffn=files["decoder"].shape("model.layers.0.mlp.down_proj.weight")[0],
        kv_width=model.num_key_value_heads * model.head_dim,
        layers=model.num_layers,
        vocab=model.vocab_size,
        max_length=model.max_positions,
        vision_hidden=hidden,
        vision_mlp=vision.shape("encoder.layers.0.mlp.fc1.weight")[1],
        vision_tokens=tokens,
        image_rows=tokens - 1,
        image_size=int(model.image_processor["image_size"]),
        image_tokens=model.image_tokens,
        images=MAX_IMAGES,
        width=int(np.dtype(dtype).itemsize),
        cache_width=files["decoder"].cache_width,
        kv_form=form,
    )
