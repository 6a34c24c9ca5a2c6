"""The geometry of a MobileVLM, as frozen records that check themselves.

A config built by hand is held to the same rules as one read from a checkpoint; reading is in
``config.py``, from where these names are meant to be imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mvlm_export.engines.errors import CheckpointError, InputError

QUESTION_ROOM = 64
"""Positions that must be left beside one image: a short question and an answer."""

PROJECTORS = (
    "ldpnetv2",
    "ldpnetv2_nopool",
    "ldpnet",
    "linear",
    "pw2",
    "pw2_pool",
    "pw2_pool_pos",
)
"""Projector types by name; ``mlpNx_gelu`` (N >= 1) is understood as well."""

VISION_ACTIVATIONS = ("quick_gelu", "gelu")
SELECT_FEATURES = ("patch", "cls_patch")
ASPECT_RATIOS = ("pad", "square")
DTYPES = ("bfloat16", "float16", "float32")

_POOLING = ("ldpnetv2", "ldpnet", "pw2_pool", "pw2_pool_pos")
_EVEN_GRID = ("ldpnetv2", "pw2_pool", "pw2_pool_pos")
_TOKENWISE = ("linear", "pw2")
_PEG = ("ldpnetv2", "ldpnetv2_nopool")

_MLP = re.compile(r"^mlp([1-9]\d*)x_gelu$")


def mlp_depth(projector_type: str) -> int | None:
    """Number of linear layers of an ``mlpNx_gelu`` projector, None for any other type."""
    match = _MLP.match(projector_type)
    return int(match.group(1)) if match else None


def require(holds: bool, message: str) -> None:
    """Raise CheckpointError with ``message`` unless ``holds``."""
    if not holds:
        raise CheckpointError(message)


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision transformer; the defaults are ViT-L/14 at 336 pixels.

    Raises:
        CheckpointError: when the geometry contradicts itself or is not implemented.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"The vision tower's {self.num_attention_heads} heads (num_attention_heads) do "
            f"not divide its hidden_size {self.hidden_size}: correct the vision config.",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"The vision tower's patch_size {self.patch_size} does not divide its image_size "
            f"{self.image_size}: correct the vision config.",
        )
        require(
            self.hidden_act in VISION_ACTIVATIONS,
            f"The vision tower's hidden_act {self.hidden_act!r} is not implemented: it can be "
            f"one of {', '.join(VISION_ACTIVATIONS)}.",
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder.

    Attributes:
        eos_token_id: the token that closes an answer.
        extra_eos_token_ids: further ids that end generation, where a checkpoint lists several.

    Raises:
        CheckpointError: when the geometry contradicts itself or is not implemented.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    extra_eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        require(
            self.hidden_size % heads == 0,
            f"The language model's {heads} heads (num_attention_heads) do not divide its "
            f"hidden_size {self.hidden_size}: correct config.json.",
        )
        require(
            self.head_dim % 2 == 0,
            f"The language model's head size {self.head_dim} (hidden_size {self.hidden_size} "
            f"/ {heads} heads) is odd, and rotary positions turn pairs: correct config.json.",
        )
        require(
            heads % kv_heads == 0,
            f"The {kv_heads} key-value heads (num_key_value_heads) do not divide the {heads} "
            "attention heads: correct config.json.",
        )
        ids = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        ids += [("eos_token_id", token) for token in self.stop_token_ids]
        for name, token in ids:
            require(
                0 <= token < self.vocab_size,
                f"{name} {token} lies outside the vocabulary of {self.vocab_size} tokens "
                "(vocab_size): correct config.json or generation_config.json.",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every id that ends generation."""
        return (self.eos_token_id, *self.extra_eos_token_ids)


@dataclass(frozen=True)
class ModelConfig:
    """A whole MobileVLM: vision tower, projector, language model.

    Attributes:
        select_layer: index into CLIP's hidden states (0 is the embeddings' output), -2 as
            published: the output of the last layer but one.
        select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.
        dtype: dtype of the checkpoint's tensors as config.json states it.

    Raises:
        CheckpointError: when the parts do not fit together or are not implemented.
    """

    vision: VisionConfig
    text: TextConfig
    projector_type: str = "ldpnetv2"
    select_layer: int = -2
    select_feature: str = "patch"
    image_aspect_ratio: str = "pad"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        kind, layers, grid = (
            self.projector_type,
            self.vision.num_hidden_layers,
            self.vision.grid,
        )
        require(
            kind in PROJECTORS or mlp_depth(kind) is not None,
            f"The projector type {kind!r} (mm_projector_type) is not implemented: it can be "
            f"one of {', '.join(PROJECTORS)}, mlpNx_gelu (mlp2x_gelu, ...).",
        )
        require(
            -layers - 1 <= self.select_layer <= layers,
            f"mm_vision_select_layer {self.select_layer} names no hidden state of a vision "
            f"tower of {layers} layers: it can be {-layers - 1} to {layers}.",
        )
        require(
            self.select_feature in SELECT_FEATURES,
            f"mm_vision_select_feature {self.select_feature!r} is not known: it can be one of "
            f"{', '.join(SELECT_FEATURES)}.",
        )
        require(
            self.select_feature == "patch"
            or kind in _TOKENWISE
            or mlp_depth(kind) is not None,
            f"The projector {kind!r} works on the grid of patches, which a class token does "
            f"not fit in: mm_vision_select_feature must be 'patch', not "
            f"{self.select_feature!r}.",
        )
        require(
            kind not in _EVEN_GRID or grid % 2 == 0,
            f"The projector {kind!r} pools 2 x 2 patches, but the grid of {grid} x {grid} is "
            "odd: correct image_size or patch_size of the vision config.",
        )
        require(
            self.image_aspect_ratio in ASPECT_RATIOS,
            f"image_aspect_ratio {self.image_aspect_ratio!r} is not implemented: it can be "
            f"one of {', '.join(ASPECT_RATIOS)}.",
        )
        require(
            self.dtype in DTYPES,
            f"The checkpoint's dtype {self.dtype!r} is not understood: it can be one of "
            f"{', '.join(DTYPES)}.",
        )

    @property
    def vision_layers_used(self) -> int:
        """How many encoder layers the selected hidden state depends on."""
        layers = self.vision.num_hidden_layers
        return self.select_layer if self.select_layer >= 0 else layers + 1 + self.select_layer

    @property
    def image_feature_tokens(self) -> int:
        """Rows of ``image_features`` for one image."""
        return self.vision.num_patches + (self.select_feature == "cls_patch")

    @property
    def pools(self) -> bool:
        """Whether the projector halves the grid along both sides."""
        return self.projector_type in _POOLING

    @property
    def pools_average(self) -> bool:
        """Whether it does so by an average pool behind its pointwise layers."""
        return self.projector_type in _EVEN_GRID

    @property
    def has_peg(self) -> bool:
        """Whether the projector adds a depthwise convolution to that convolution's input."""
        return self.projector_type in _PEG

    @property
    def image_tokens(self) -> int:
        """Rows of ``image_embeds`` for one image (144 for the published models)."""
        if not self.pools:
            return self.image_feature_tokens
        grid = self.vision.grid
        side = (grid + 1) // 2 if self.projector_type == "ldpnet" else grid // 2
        return side * side

    @property
    def shortest_length(self) -> int:
        """Fewest positions that a bundle may have."""
        return self.image_tokens + QUESTION_ROOM

    def limited(self, max_length: int | None) -> ModelConfig:
        """The same with sequences of ``max_length`` positions at most; None changes nothing.

        Raises:
            CheckpointError: the model itself has too few.
            InputError: it is more than the model has, or too short for an image.
        """
        most, least = self.text.max_position_embeddings, self.shortest_length
        if most < least:
            raise CheckpointError(
                f"The model has {most} positions (max_position_embeddings), but an image and "
                f"a short question take {least}. Correct config.json."
            )
        if max_length is None:
            return self
        if not least <= max_length <= most:
            raise InputError(
                f"--max-length {max_length} does not fit: this model takes {least} (an image "
                f"and a short question) to {most} positions (max_position_embeddings)."
            )
        return replace(self, text=replace(self.text, max_position_embeddings=max_length))
