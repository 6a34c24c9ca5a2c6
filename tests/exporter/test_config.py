"""Reading config.json: the published geometries, defaults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm_export.engines.errors import CheckpointError, InputError
from mvlm_export.exporter.config import (
    PRESETS,
    PROJECTORS,
    VisionConfig,
    mlp_depth,
    parse_config,
    published_config_json,
    read_config,
)
from mvlm_export.exporter.geometry import VISION_ACTIVATIONS
from mvlm_export.exporter.models.clip_vision import ACTIVATIONS
from tests.helpers import tiny_config_json

# hidden, layers, heads, head dim, FFN, eps, positions: the table of mobilevlm_v2.md
PUBLISHED = {
    "v2-1.7b": (2048, 24, 16, 128, 5632, 1e-6, 2048),
    "v2-3b": (2560, 32, 32, 80, 6912, 1e-6, 2048),
    "v2-7b": (4096, 32, 32, 128, 11008, 1e-5, 4096),
}


OPTIONAL = (
    "num_key_value_heads",
    "rope_theta",
    "rms_norm_eps",
    "max_position_embeddings",
    "eos_token_id",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
    "mm_hidden_size",
    "architectures",
    "model_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "hidden_act",
    "vision_tower_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "rope_scaling",
    "use_mm_proj",
)


def without(content: dict, *keys: str) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_geometry(name):
    config = PRESETS[name]
    text = config.text
    assert PUBLISHED[name] == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.head_dim,
        text.intermediate_size,
        text.rms_norm_eps,
        text.max_position_embeddings,
    )
    assert text.num_key_value_heads == text.num_attention_heads
    assert (text.vocab_size, text.rope_theta, text.tie_word_embeddings) == (32000, 1e4, False)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 0)
    assert config.vision == VisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu")
    assert (config.projector_type, config.select_layer) == ("ldpnetv2", -2)
    assert (config.vision_layers_used, config.vision.num_patches) == (23, 576)
    assert (config.image_feature_tokens, config.image_tokens) == (576, 144)


def test_presets_are_what_was_published_and_no_more():
    assert set(PRESETS) == set(PUBLISHED)
    with pytest.raises(InputError, match=r"v2-2b.*v2-1\.7b, v2-3b, v2-7b"):
        published_config_json("v2-2b")


def test_published_json_is_a_fresh_dict_each_time():
    published_config_json("v2-3b")["hidden_size"] = 1
    assert published_config_json("v2-3b")["hidden_size"] == 2560


def test_absent_keys_take_the_published_defaults():
    assert (
        parse_config(without(published_config_json("v2-1.7b"), *OPTIONAL))
        == PRESETS["v2-1.7b"]
    )


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "mm_projector_type",
        "mm_vision_tower",
    ],
)
def test_a_key_without_default_is_asked_for(key):
    with pytest.raises(CheckpointError, match=rf"lacks '{key}'.*add the key"):
        parse_config(without(published_config_json("v2-1.7b"), key))


def test_null_counts_as_absent():
    content = published_config_json("v2-3b") | {
        "num_key_value_heads": None,
        "head_dim": None,
        "pad_token_id": None,
        "rope_theta": None,
        "quantization_config": None,
    }
    assert parse_config(content) == PRESETS["v2-3b"]


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({}, 10000.0),
        ({"rope_theta": 500000}, 500000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 500000.0),
        ({"rope_scaling": {"type": "default"}}, 10000.0),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, 500000.0),
    ],
)
def test_rope_theta_is_found_where_each_version_puts_it(rope, theta):
    content = without(published_config_json("v2-1.7b"), "rope_scaling") | rope
    assert parse_config(content).text.rope_theta == theta


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": None, "dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float16"),
    ],
)
def test_dtype_under_both_names(keys, dtype):
    assert parse_config(published_config_json("v2-1.7b") | keys).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.*only plain rotary"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3'.*only plain rotary"),
        ({"rope_scaling": {"factor": 2.0}}, "factor.*2.0.*scaled rotary"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "two rotary bases"),
        ({"rope_theta": -1}, "rope_theta as -1.*above zero"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor to 0.5"),
        ({"attention_bias": True}, "attention_bias to True.*not implemented"),
        ({"mlp_bias": True}, "mlp_bias to True.*not implemented"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'.*'silu'"),
        ({"head_dim": 32}, "head_dim to 32.*64 / 4"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end.*not implemented"),
        ({"vision_tower_type": "siglip"}, "'siglip'.*only CLIP"),
        ({"model_type": "qwen2_vl"}, "'qwen2_vl'.*mobilevlm"),
        ({"text_config": {"hidden_size": 3}}, "text_config.*nested"),
        ({"quantization_config": {"bits": 4}}, "quantised already.*original"),
        ({"sliding_window": 128}, "sliding_window to 128"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type.*flat"),
        ({"use_mm_proj": False}, "use_mm_proj.*without a projector"),
        ({"image_aspect_ratio": "anyres"}, "'anyres'.*pad, square"),
        ({"torch_dtype": "int8"}, "'int8'.*bfloat16, float16, float32"),
        ({"num_attention_heads": 5}, "5 heads.*do not divide its hidden_size 64"),
        ({"hidden_size": 68, "num_key_value_heads": 4}, "head size 17.*odd"),
        ({"num_key_value_heads": 3}, "3 key-value heads.*do not divide the 4"),
        ({"vision_config": {"num_attention_heads": 5}}, "5 heads.*hidden_size 32"),
        ({"vision_config": {"patch_size": 15}}, "patch_size 15.*image_size 56"),
        ({"vision_config": {"hidden_act": "relu"}}, "'relu'.*quick_gelu, gelu"),
        ({"vision_config": {"num_channels": 1}}, "num_channels to 1.*RGB"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "only CLIP"),
        ({"vision_config": {"image_size": 42}}, "grid of 3 x 3 is odd"),
        ({"mm_vision_select_layer": -5}, "-5.*3 layers: it can be -4 to 3"),
        ({"mm_vision_select_layer": 4}, "4.*3 layers: it can be -4 to 3"),
        ({"mm_vision_select_feature": "cls"}, "'cls'.*patch, cls_patch"),
        ({"mm_vision_select_feature": "cls_patch"}, "'ldpnetv2'.*must be 'patch'"),
        ({"mm_projector_type": "qformer"}, "'qformer'.*ldpnetv2, .*pw2_pool_pos, mlpNx_gelu"),
        ({"mm_projector_type": "mlp0x_gelu"}, "'mlp0x_gelu'.*not implemented"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size.*1024.*hidden_size is 32"),
        ({"eos_token_id": 320}, "eos_token_id 320 lies outside.*320 tokens"),
        ({"eos_token_id": [2, 999]}, "eos_token_id 999.*outside"),
        ({"eos_token_id": []}, "eos_token_id as \\[\\]"),
        ({"bos_token_id": 500}, "bos_token_id 500 lies outside"),
        ({"pad_token_id": -2}, "pad_token_id -2 lies outside"),
        ({"num_hidden_layers": 0}, "num_hidden_layers as 0.*at least 1"),
        ({"hidden_size": "64"}, "hidden_size as '64'.*whole number"),
        ({"hidden_size": 64.0}, "hidden_size as 64.0.*whole number"),
        ({"vocab_size": True}, "vocab_size as True.*whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps as '1e-6'.*a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps as nan.*finite"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings as 'no'.*true or false"),
        ({"mm_projector_type": 3}, "mm_projector_type as 3.*a string"),
        ({"rope_scaling": 2.0}, "rope_scaling as 2.0.*an object"),
    ],
)
def test_what_is_not_implemented_is_refused(changes, message):
    parse_config(tiny_config_json())
    with pytest.raises(CheckpointError, match=message):
        parse_config(tiny_config_json(**changes))


@pytest.mark.parametrize(
    "key", ["hidden_size", "image_size", "patch_size", "num_hidden_layers"]
)
def test_a_vision_block_must_state_its_sizes(key):
    content = tiny_config_json()
    del content["vision_config"][key]
    with pytest.raises(CheckpointError, match=f"vision_config of config.json lacks '{key}'"):
        parse_config(content)


def test_stop_ids_from_both_files():
    content = tiny_config_json(eos_token_id=[2, 7, 2])
    text = parse_config(content).text
    assert (text.eos_token_id, text.stop_token_ids) == (2, (2, 7))
    text = parse_config(content, generation_config={"eos_token_id": 9}).text
    assert (text.eos_token_id, text.stop_token_ids) == (9, (9,))
    assert parse_config(content, generation_config={}).text.stop_token_ids == (2, 7)


def test_pad_token_of_early_llama_configs():
    assert parse_config(tiny_config_json(pad_token_id=-1)).text.pad_token_id == 0


@pytest.mark.parametrize("kind", [*PROJECTORS, "mlp1x_gelu", "mlp2x_gelu"])
def test_image_tokens_of_each_projector(kind):
    config = parse_config(tiny_config_json(mm_projector_type=kind))
    pools = kind in ("ldpnetv2", "ldpnet", "pw2_pool", "pw2_pool_pos")
    assert (config.pools, config.image_tokens) == (pools, 4 if pools else 16)


def test_class_token_counts_as_a_row():
    content = tiny_config_json(
        mm_projector_type="mlp2x_gelu", mm_vision_select_feature="cls_patch"
    )
    config = parse_config(content)
    assert (config.image_feature_tokens, config.image_tokens) == (17, 17)


def test_v1_projector_takes_an_odd_grid():
    content = tiny_config_json(mm_projector_type="ldpnet", vision_config={"image_size": 70})
    assert parse_config(content).image_tokens == 9


@pytest.mark.parametrize(
    ("layer", "used"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (3, 3), (1, 1)]
)
def test_vision_layers_used(layer, used):
    config = parse_config(tiny_config_json(mm_vision_select_layer=layer))
    assert config.vision_layers_used == used


def test_mlp_depth():
    assert [mlp_depth(f"mlp{n}x_gelu") for n in (1, 2, 12)] == [1, 2, 12]
    assert [mlp_depth(name) for name in ("mlp0x_gelu", "mlpx_gelu", "linear")] == [None] * 3


def test_vision_activations_are_those_that_the_model_has():
    assert set(VISION_ACTIVATIONS) == set(ACTIVATIONS)


TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


def write_config(folder: Path, content: dict, tower: Path | None = None, raw: dict = TOWER):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    if tower is not None:
        tower.mkdir(parents=True)
        (tower / "config.json").write_text(json.dumps(raw))


def tower_json(name: str) -> dict:
    return without(tiny_config_json(mm_vision_tower=name, mm_hidden_size=64), "vision_config")


@pytest.mark.parametrize("raw", [TOWER, {"model_type": "clip", "vision_config": TOWER}])
@pytest.mark.parametrize("place", ["model/towers/clip", "model/clip", "towers/clip", "clip"])
def test_geometry_from_a_local_tower(tmp_path, place, raw):
    write_config(tmp_path / "model", tower_json("towers/clip"), tmp_path / place, raw)
    vision = read_config(tmp_path / "model").vision
    assert vision == VisionConfig(64, 128, 2, 4, 28, 7, 1e-6, "gelu")


def test_geometry_from_a_tower_by_absolute_path(tmp_path):
    tower = tmp_path / "elsewhere" / "clip"
    write_config(tmp_path / "model", tower_json(str(tower)), tower)
    assert read_config(tmp_path / "model").vision.image_size == 28


def test_a_vision_block_goes_before_a_tower(tmp_path):
    write_config(tmp_path / "m", tiny_config_json(mm_vision_tower="clip"), tmp_path / "clip")
    assert read_config(tmp_path / "m").vision.image_size == 56


def test_known_tower_by_name_wherever_it_was_kept():
    content = published_config_json("v2-3b")
    content["mm_vision_tower"] = "/data/trained/clip-vit-large-patch14-336/"
    assert parse_config(content) == PRESETS["v2-3b"]


def test_unknown_tower_is_named(tmp_path):
    write_config(tmp_path, tower_json("acme/vit-huge"))
    with pytest.raises(CheckpointError, match=r"acme/vit-huge.*add a vision_config block"):
        read_config(tmp_path)


def test_read_config_reads_generation_config(tmp_path):
    write_config(tmp_path, tiny_config_json())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert read_config(tmp_path).text.stop_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json does not exist.*give the folder"),
        ("{", "cannot be used as JSON.*download it again"),
        ("[1]", "holds a JSON list, not an object"),
        ("[" * 100_000, "cannot be used as JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "names a more than once"),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    ],
)
def test_unusable_config_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_folder_missing(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        read_config(tmp_path / "nowhere")


def test_a_missing_aspect_ratio_is_not_padded_as_in_the_published_code():
    content = without(published_config_json("v2-1.7b"), "image_aspect_ratio")
    assert parse_config(content).image_aspect_ratio == "square"
