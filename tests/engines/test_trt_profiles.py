"""Profiles by dimension name, and what is refused before TensorRT is asked."""

from __future__ import annotations

import pytest

from mvlm_export.engines.build import graph_profiles
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.trt_profiles import (
    NetworkInput,
    ProfileSpec,
    decoder_profiles,
    map_profile,
    vision_profiles,
)

from .manifests import MODEL
from .trt_graphs import message_of, save_append_attention, save_relu


def test_profile_lacking_a_dimension(tmp_path):
    path = save_append_attention(tmp_path / "decoder.onnx")
    text = message_of(path, [ProfileSpec("decode", {"S": (1, 1, 2)})])
    assert "'decode' gives no range for dimension 'T' (axis 0 of input 'past_k')" in text


def test_profile_with_a_dimension_no_input_has(tmp_path):
    path = save_relu(tmp_path / "m.onnx")
    text = message_of(path, [ProfileSpec("p", {"S": (1, 1, 2), "Q": (1, 1, 1)})])
    assert "'Q'" in text
    assert "the graph's are: S" in text


def test_min_above_opt_is_refused_before_any_build():
    with pytest.raises(InputError, match="min 3, opt 2, max 4"):
        ProfileSpec("p", {"S": (3, 2, 4)})


def test_dynamic_graph_without_profile(tmp_path):
    text = message_of(save_relu(tmp_path / "m.onnx"))
    assert "dynamic inputs (x) but no profile" in text


def test_unnamed_dimension(tmp_path):
    path = save_relu(tmp_path / "m.onnx", dim=None)
    assert "no name" in message_of(path, [ProfileSpec("p", {"S": (1, 1, 2)})])


def test_two_profiles_of_one_name(tmp_path):
    profile = ProfileSpec("p", {"S": (1, 1, 2)})
    assert "must differ" in message_of(save_relu(tmp_path / "m.onnx"), [profile, profile])


def test_decoder_profiles_by_weight_kind():
    prefill, decode = decoder_profiles(2048, 144, "fp16")
    assert prefill.dims == {"S": (1, 256, 1024), "T": (0, 0, 2047), "I": (1, 144, 144)}
    assert decode.dims == {"S": (1, 1, 2), "T": (0, 512, 2047), "I": (1, 144, 144)}
    assert decoder_profiles(2048, 144, "int8")[1].dims["S"] == (1, 1, 2)
    assert decoder_profiles(2048, 144, "int4")[1].dims["S"] == (1, 1, 1)
    assert decoder_profiles(2, 1, "fp32")[0].dims["S"] == (1, 2, 2)
    assert decoder_profiles(512, 1, "fp32")[0].dims["S"] == (1, 256, 512)


def test_a_fixed_cache_has_no_range_of_past_tokens():
    """Its tensors are of a fixed size, and past_length is a value."""
    profiles = decoder_profiles(2048, 144, "fp16", kv_form="fixed")
    assert [profile.name for profile in profiles] == ["prefill", "decode"]
    assert profiles[0].dims == {"S": (1, 256, 1024), "I": (1, 144, 144)}
    assert profiles[1].dims == {"S": (1, 1, 2), "I": (1, 144, 144)}
    inputs = [
        NetworkInput("input_ids", (-1,), ("S",)),
        NetworkInput("image_embeds", (-1, 8), ("I", None)),
        NetworkInput("past_length", (1,), (None,)),
        NetworkInput("past_key_values.0.key", (1, 2, 2048, 4), (None,) * 4),
    ]
    for profile in profiles:
        assert set(map_profile(inputs, profile)) == {"input_ids", "image_embeds"}
    with pytest.raises(EngineError, match="gives ranges for 'T', but"):
        map_profile(inputs, decoder_profiles(2048, 144, "fp16")[0])


def test_profiles_of_a_bundle_follow_its_cache_form():
    for form, dims in (("append", {"S", "T", "I"}), ("fixed", {"S", "I"})):
        decoder = graph_profiles(MODEL, "fp16", form)["decoder"]
        assert all(set(profile.dims) == dims for profile in decoder)


def test_vision_profiles_and_impossible_sizes():
    assert vision_profiles(4)[0].dims == {"B": (1, 1, 4)}
    with pytest.raises(InputError, match="max_batch is 0"):
        vision_profiles(0)
    with pytest.raises(InputError, match="max_length >= 2"):
        decoder_profiles(1, 144, "fp16")
