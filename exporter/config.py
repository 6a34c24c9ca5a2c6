"""Reading the geometry of a MobileVLM checkpoint from its ``config.json``.

What changes the numbers is either implemented or refused here; keys that are absent take the
value that the published code takes. The records themselves are in ``geometry.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvlm_export.engines.errors import CheckpointError, InputError

from .config_fields import Fields, read_json
from .geometry import (
    PROJECTORS,
    ModelConfig,
    TextConfig,
    VisionConfig,
    mlp_depth,
    require,
)

__all__ = [
    "KNOWN_TOWERS",
    "PRESETS",
    "PROJECTORS",
    "ModelConfig",
    "TextConfig",
    "VisionConfig",
    "mlp_depth",
    "parse_config",
    "published_config_json",
    "read_config",
]

_MODEL_TYPES = ("mobilevlm", "llava", "llava_llama")
_ONLY_DEFAULT: dict[str, tuple[tuple[object, ...], str]] = {
    "model_type": (_MODEL_TYPES, f"this compiler reads {', '.join(_MODEL_TYPES)} checkpoints"),
    "text_config": ((), "this is transformers' own nested LLaVA layout; the flat layout that "
                    "MobileVLM publishes is needed"),
    "hidden_act": (("silu",), "only LLaMA's 'silu' is implemented in the language model"),
    "attention_bias": ((False,), "attention biases are not implemented (LLaMA has none)"),
    "mlp_bias": ((False,), "MLP biases are not implemented (LLaMA has none)"),
    "partial_rotary_factor": ((1,), "only a full rotation of each head is implemented"),
    "sliding_window": ((), "sliding-window attention is not implemented"),
    "quantization_config": ((), "the weights are quantised already; give the original "
                            "bfloat16, float16 or float32 checkpoint"),
    "vision_tower_type": (("clip",), "only CLIP vision towers are implemented"),
    "mm_use_im_start_end": ((False,), "start and end tokens around the image are not "
                            "implemented"),
    "mm_patch_merge_type": (("flat",), "only 'flat' image rows are implemented"),
    "use_mm_proj": ((True,), "this is a language model alone, without a projector; give the "
                    "checkpoint of the whole MobileVLM"),
}  # fmt: skip

KNOWN_TOWERS = {"clip-vit-large-patch14-336": VisionConfig()}
"""Geometry of towers by the last part of ``mm_vision_tower``."""


def _parse_rope_theta(fields: Fields) -> float:
    """Rotary base, under ``rope_theta`` or transformers 5's ``rope_parameters``."""
    theta: float | None = fields.number("rope_theta") if fields.has("rope_theta") else None
    for key in ("rope_parameters", "rope_scaling"):
        block = fields.block(key)
        for kind in ("rope_type", "type"):
            block.refuse_unless(
                kind, ("default",), "only plain rotary positions ('default') are implemented"
            )
        block.refuse_unless(
            "partial_rotary_factor", (1,), "only a full rotation is implemented"
        )
        block.refuse_unless("factor", (1,), "scaled rotary positions are not implemented")
        if block.has("rope_theta"):
            nested = block.number("rope_theta")
            require(
                theta is None or theta == nested,
                f"{fields.source} states two rotary bases, rope_theta {theta} and {nested} in "
                f"{key}: leave the right one.",
            )
            theta = nested
    return 10000.0 if theta is None else theta


def _parse_text(fields: Fields, generation: Fields) -> TextConfig:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if fields.has("head_dim"):
        head_dim = fields.integer("head_dim")
        require(
            head_dim * heads == hidden,
            f"{fields.source} sets head_dim to {head_dim}, but only hidden_size / "
            f"num_attention_heads ({hidden} / {heads}) is implemented.",
        )
    # As in transformers, generation_config.json has the last word on where to stop.
    stop = generation.token_ids("eos_token_id", fields.token_ids("eos_token_id", (2,)))
    pad = fields.integer("pad_token_id", default=0, minimum=None)
    return TextConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope_theta=_parse_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings", default=2048),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        bos_token_id=fields.integer("bos_token_id", default=1, minimum=0),
        eos_token_id=stop[0],
        pad_token_id=0 if pad == -1 else pad,  # -1 is how early LLaMA configs say "none"
        extra_eos_token_ids=stop[1:],
    )


def _parse_vision(fields: Fields) -> VisionConfig:
    """A tower from CLIP's keys; sizes have no default, since CLIP's own differ by model."""
    if fields.has("vision_config"):
        fields = fields.block("vision_config")
    fields.refuse_unless(
        "model_type", ("clip", "clip_vision_model"), "only CLIP vision towers are implemented"
    )
    fields.refuse_unless("num_channels", (3,), "the vision tower must take RGB images")
    return VisionConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        layer_norm_eps=fields.number("layer_norm_eps", default=1e-5),
        hidden_act=fields.text("hidden_act", default="quick_gelu"),
    )


def _choose_vision(fields: Fields, tower_config: Mapping[str, Any] | None) -> VisionConfig:
    """``vision_config``, else the tower's own config, else a tower known by name."""
    if fields.has("vision_config"):
        return _parse_vision(fields.block("vision_config"))
    if tower_config is not None:
        return _parse_vision(Fields(tower_config, "the vision tower's config.json"))
    name = fields.text("mm_vision_tower")
    known = KNOWN_TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])
    if known is None:
        raise CheckpointError(
            f"The geometry of the vision tower {name!r} (mm_vision_tower of {fields.source}) "
            f"is not known: it is neither a local folder nor {', '.join(KNOWN_TOWERS)}. "
            "Put the tower's folder beside the checkpoint, or add a vision_config block."
        )
    return known


def parse_config(
    raw: Mapping[str, Any],
    tower_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """The model that the content of a ``config.json`` describes.

    Args:
        raw: content of the checkpoint's ``config.json``.
        tower_config: content of the vision tower's own ``config.json``, where there is one; a
            ``vision_config`` block in ``raw`` goes before it.
        generation_config: content of ``generation_config.json``, where there is one; only its
            ``eos_token_id`` is used.

    Raises:
        CheckpointError: when a key is missing or wrong, or asks for what is not implemented.
    """
    fields = Fields(raw, "config.json")
    for key, (allowed, why) in _ONLY_DEFAULT.items():
        fields.refuse_unless(key, allowed, why)
    vision = _choose_vision(fields, tower_config)
    mm_hidden = fields.integer("mm_hidden_size", default=vision.hidden_size)
    require(
        mm_hidden == vision.hidden_size,
        f"mm_hidden_size of config.json is {mm_hidden}, but the vision tower's hidden_size is "
        f"{vision.hidden_size}: the projector and the tower do not belong together; check "
        "mm_vision_tower or the vision_config block.",
    )
    dtype = fields.text("dtype", default=fields.text("torch_dtype", default="float16"))
    return ModelConfig(
        vision=vision,
        text=_parse_text(fields, Fields(generation_config or {}, "generation_config.json")),
        projector_type=fields.text("mm_projector_type"),
        select_layer=fields.integer("mm_vision_select_layer", default=-2, minimum=None),
        select_feature=fields.text("mm_vision_select_feature", default="patch"),
        image_aspect_ratio=fields.text("image_aspect_ratio", default="square"),
        dtype=dtype.removeprefix("torch."),
    )


def _read_tower_config(folder: Path, tower: object) -> dict[str, Any] | None:
    """The tower's own config when ``mm_vision_tower`` names a folder, here or beside us."""
    if not isinstance(tower, str) or not tower:
        return None
    name = Path(tower)
    places = (
        folder / name,
        folder / name.name,
        folder.parent / name,
        folder.parent / name.name,
    )
    for place in (*places, name):
        try:
            found = (place / "config.json").is_file()
        except OSError as error:
            raise CheckpointError(
                f"The vision tower {tower[:100]!r} (mm_vision_tower of config.json) cannot be "
                f"looked for ({error.strerror or error}): name its folder or one of "
                f"{', '.join(KNOWN_TOWERS)}."
            ) from error
        if found:
            return read_json(place / "config.json")
    return None


def read_config(folder: Path) -> ModelConfig:
    """The model in a checkpoint folder, from ``config.json`` and what stands beside it.

    Raises:
        CheckpointError: when the folder or a key is missing or wrong, or the model asks for
            what is not implemented.
    """
    require(
        folder.is_dir(),
        f"{folder} is not a folder: give the folder of a downloaded MobileVLM checkpoint, "
        "with its config.json and weights inside.",
    )
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_config(
        raw,
        _read_tower_config(folder, raw.get("mm_vision_tower")),
        read_json(generation) if generation.is_file() else None,
    )


_PUBLISHED_COMMON: dict[str, Any] = {
    "architectures": ["MobileLlamaForCausalLM"],
    "model_type": "mobilevlm",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "vocab_size": 32000,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "vision_tower_type": "clip",
    "mm_hidden_size": 1024,
    "mm_projector_type": "ldpnetv2",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "use_mm_proj": True,
    "torch_dtype": "bfloat16",
}
_GEOMETRY_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
)
_PUBLISHED_GEOMETRY: dict[str, tuple[int | float, ...]] = {
    "v2-1.7b": (2048, 24, 16, 16, 5632, 1e-6, 2048),
    "v2-3b": (2560, 32, 32, 32, 6912, 1e-6, 2048),
    "v2-7b": (4096, 32, 32, 32, 11008, 1e-5, 4096),
}


def published_config_json(name: str) -> dict[str, Any]:
    """Content of ``config.json`` of a published MobileVLM V2 (``v2-1.7b``, ``v2-3b``, ...).

    Raises:
        InputError: when there is no such model.
    """
    geometry = _PUBLISHED_GEOMETRY.get(name)
    if geometry is None:
        raise InputError(
            f"There is no published geometry {name!r}: choose one of "
            f"{', '.join(_PUBLISHED_GEOMETRY)}."
        )
    return {**_PUBLISHED_COMMON, **dict(zip(_GEOMETRY_KEYS, geometry, strict=True))}


PRESETS = {name: parse_config(published_config_json(name)) for name in _PUBLISHED_GEOMETRY}
"""The published MobileVLM V2 models by name."""
