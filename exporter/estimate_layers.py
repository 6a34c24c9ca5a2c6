"""The layers of the three finished graphs, from a geometry alone: bytes and products.

These are the graphs as the passes leave them: query, key and value merged into one product,
gate and up into another, norms folded into the next weights, the pool in front of the
projector's second product, rotary positions as two tables. No checkpoint is read and no graph
is made; tests hold the figures to those of real graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mvlm_export.calibration.layers import LayerKind
from mvlm_export.calibration.recipe import GraphRecipe, Recipe
from mvlm_export.calibration.weight_grids import WeightFormat

from .geometry import ModelConfig, mlp_depth

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Layer:
    """A weight [rows, columns] as a product reads it, a table turned round, or constants.

    Attributes:
        name: as recipes know it.
        kind: None for biases, norms and tables, which always stay in float.
        calls: rows of its input, for one image or one token; 0 for what multiplies nothing.
        last_row: whether it runs for a prompt's last token alone, whose logits are wanted.
    """

    name: str
    kind: LayerKind | None
    rows: int
    columns: int
    calls: int = 0
    last_row: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image or one token."""
        return self.calls * self.rows * self.columns


@dataclass(frozen=True)
class StoredLayer:
    """A layer in the form that a recipe gives it.

    Attributes:
        form: None for float.
        bytes: with scales, zero points and offsets.
        integer: whether its inputs are 8-bit too, so that the product is one of integers.
    """

    layer: Layer
    form: WeightFormat | None
    bytes: int
    integer: bool

    @property
    def four_bit(self) -> int:
        """How many of its weights take 4 bits."""
        is_four = self.form is not None and self.form.bits == 4
        return self.layer.rows * self.layer.columns if is_four else 0


def store_layers(
    config: ModelConfig, recipe: Recipe, width: int
) -> dict[str, tuple[StoredLayer, ...]]:
    """Layers of the three graphs, each in the form that the recipe gives it.

    Args:
        config: its ``max_position_embeddings`` are the rows of the rotary tables.
        width: bytes of what stays in float: 2 for float16, 4 for float32.
    """
    return {
        graph: tuple(
            _store(layer, recipe.graph(graph), width)
            for layer in (*layers, *_moved_scales(graph, recipe.graph(graph), config))
        )
        for graph, layers in describe_layers(config).items()
    }


def describe_layers(config: ModelConfig) -> Mapping[str, tuple[Layer, ...]]:
    """Layers of the three graphs in float."""
    return {
        "vision_encoder": tuple(_vision_layers(config)),
        "projector": tuple(_projector_layers(config)),
        "decoder": tuple(_decoder_layers(config)),
    }


def attention_macs(config: ModelConfig) -> int:
    """Products of the encoder's attention for one image: ``Q K^T`` and that with V."""
    tokens = config.vision.num_patches + 1
    return 2 * config.vision_layers_used * tokens**2 * config.vision.hidden_size


def decoder_attention_macs(config: ModelConfig, new: int, past: int) -> int:
    """The decoder's for ``new`` tokens behind ``past``, counted without the causal mask."""
    text = config.text
    return 2 * text.num_hidden_layers * new * (past + new) * text.hidden_size


def _store(layer: Layer, recipe: GraphRecipe, width: int) -> StoredLayer:
    floats = layer.rows * layer.columns * width
    form = None if layer.kind is None else recipe.form_of(layer.name, layer.kind)
    if form is None:
        return StoredLayer(layer, None, floats, integer=False)
    form = form.for_rows(layer.rows)
    zeros = layer.columns if form.bits == 8 else 0
    stored = form.stored_bytes(layer.rows, layer.columns, width) + zeros
    integer = recipe.activations and form.bits == 8 and layer.kind != "embedding"
    return StoredLayer(layer, form, stored, integer)


def _moved_scales(graph: str, recipe: GraphRecipe, config: ModelConfig) -> Iterator[Layer]:
    """A vector in each norm, where a recipe moves scales of channels into it."""
    if recipe.smooth or (not recipe.has_float_layers and "awq" in recipe.method):
        if graph == "decoder":
            count = 2 * config.text.num_hidden_layers + 1
            yield Layer("moved scales", None, count, config.text.hidden_size)
        elif graph == "vision_encoder":
            count = 2 * config.vision_layers_used
            yield Layer("moved scales", None, count, config.vision.hidden_size)


def _constants(name: str, count: int) -> Layer:
    return Layer(name, None, 1, count)


def _vision_layers(config: ModelConfig) -> Iterator[Layer]:
    vision = config.vision
    hidden, mlp, tokens = vision.hidden_size, vision.intermediate_size, vision.num_patches + 1
    pixels = 3 * vision.patch_size**2
    name = "embeddings.patch_embedding"
    yield Layer(name, "conv", pixels, hidden, vision.num_patches)
    # The patches' bias, the first norm's weight and bias, and the ones of the others.
    yield _constants("embeddings", (tokens + 4) * hidden)
    last = config.vision_layers_used - 1
    for index in range(config.vision_layers_used):
        prefix = f"encoder.layers.{index}"
        # Behind the last attention the class token is dropped, where nobody asks for it.
        rows = config.image_feature_tokens if index == last else tokens
        yield Layer(f"{prefix}.self_attn.q_proj", "linear", hidden, 3 * hidden, tokens)
        yield Layer(f"{prefix}.self_attn.out_proj", "linear", hidden, hidden, rows)
        yield Layer(f"{prefix}.mlp.fc1", "linear", hidden, mlp, rows)
        yield Layer(f"{prefix}.mlp.fc2", "linear", mlp, hidden, rows)
        yield _constants(f"{prefix} biases", 5 * hidden + mlp)


def _projector_layers(config: ModelConfig) -> Iterable[Layer]:
    kind = config.projector_type
    if kind == "ldpnet":
        return _ldp_layers(config)
    depth = 1 if kind == "linear" else mlp_depth(kind)
    if depth is not None:
        names = ["weight"] if kind == "linear" else [str(2 * index) for index in range(depth)]
        return _pointwise_layers(config, names)
    layers = [*_pointwise_layers(config, ["mlp.mlp.0", "mlp.mlp.2"])]
    width, rows = config.text.hidden_size, config.image_tokens
    if config.has_peg:
        layers += [Layer("peg.peg.0", "conv", 9, width, rows), _constants("peg bias", width)]
    if kind == "pw2_pool_pos":
        layers.append(_constants("pos", rows * width))
    return layers


def _pointwise_layers(config: ModelConfig, names: list[str]) -> Iterator[Layer]:
    """Linear layers; an average pool stands before the second, which is then called less."""
    width, calls = config.text.hidden_size, config.image_feature_tokens
    rows = config.vision.hidden_size
    for name in names:
        yield Layer(name, "linear", rows, width, calls)
        yield _constants(f"{name} bias", width)
        rows = width
        calls = config.image_tokens if config.pools_average else calls


def _ldp_layers(config: ModelConfig) -> Iterator[Layer]:
    """V1's projector: two pointwise layers and two inverted residual blocks."""
    yield from _pointwise_layers(config, ["model.mlp.1", "model.mlp.3"])
    width = config.text.hidden_size
    squeezed = -(-width // 4 // 8) * 8
    for number, calls in ((1, config.image_feature_tokens), (2, config.image_tokens)):
        prefix = f"model.mb_block.{number}.block"
        yield Layer(f"{prefix}.0.0", "conv", 9, width, calls)
        yield Layer(f"{prefix}.1.fc1", "conv", width, squeezed, 1)
        yield Layer(f"{prefix}.1.fc2", "conv", squeezed, width, 1)
        yield Layer(f"{prefix}.2.0", "conv", width, width, calls)
        yield _constants(f"{prefix} norms", 5 * width + squeezed)


def _decoder_layers(config: ModelConfig) -> Iterator[Layer]:
    text = config.text
    hidden, ffn = text.hidden_size, text.intermediate_size
    merged = hidden + 2 * text.num_key_value_heads * text.head_dim
    yield Layer(EMBEDDING, "embedding", hidden, text.vocab_size)
    yield _constants("rotary tables", 2 * text.max_position_embeddings * text.head_dim)
    for index in range(text.num_hidden_layers):
        prefix = f"model.layers.{index}"
        # Of the last layer, keys and values alone are wanted of the tokens before the last.
        last = index == text.num_hidden_layers - 1
        yield Layer(f"{prefix}.self_attn.q_proj", "linear", hidden, merged, 1)
        yield Layer(f"{prefix}.self_attn.o_proj", "linear", hidden, hidden, 1, last)
        yield Layer(f"{prefix}.mlp.gate_proj", "linear", hidden, 2 * ffn, 1, last)
        yield Layer(f"{prefix}.mlp.down_proj", "linear", ffn, hidden, 1, last)
    yield Layer(HEAD, "linear", hidden, text.vocab_size, 1, last_row=True)
