"""Warnings of TensorRT: which stop a build, which pass, which are shown."""

from __future__ import annotations

import sys

import pytest
from onnx import helper

from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import ProfileSpec, build_engine, decoder_profiles
from mvlm_export.engines.trt_warnings import (
    HARMLESS,
    REFUSED,
    describe_refused,
    find_rule,
    notable_warnings,
)

from . import fake_tensorrt_10_3
from .trt_graphs import RTX, leftovers, save, save_relu, save_scatter_attention, value

# TensorRT's and its parser's own words, where they are known (public sources and issues).
BAD = {
    "Unused Input: kv_len": "ignore the input",
    "Running layernorm after self-attention with FP16 Reduce or Pow may cause overflow. "
    "Forcing Reduce or Pow Layers in FP32 can help preserving accuracy.": "sum of squares",
    "Detected layernorm nodes in FP16.": "sum of squares",
    "ModelImporter.cpp:407: One or more weights outside the range of INT32 was clamped": "fit",
    "Weights [name=MatMul_3] had the following issues when converted to FP16:": "fit",
    "Missing scale and zero-point for tensor x, expect fall back to non-int8": "no scale",
    "Layer conv_1 falls back to FP32": "another type",
    "DOUBLE: casting down from DOUBLE to FLOAT": "float64",
    "convert_element_type: converting DOUBLE weights to FLOAT": "float64",
    "This may lead to a loss of precision": "numbers get worse",
}
GOOD = (
    "ModelImporter.cpp:1071: Make sure input pos has Int64 binding.",
    "kMAX values for profile 0 are not self-consistent.",
    "Your ONNX model has been generated with INT64 weights, while TensorRT does not natively "
    "support INT64. Attempting to cast down to INT32.",
    "Using an engine plan file across different models of devices is not recommended and is "
    "likely to affect performance or even cause errors.",
    "TensorRT was linked against cuDNN 8.9.6 but loaded cuDNN 8.9.4",
    "CUDA lazy loading is not enabled. Enabling it can significantly reduce memory usage.",
    "Unable to determine GPU memory usage: CUDA driver version is insufficient",
)
UNKNOWN = "A words of TensorRT that no table has"


@pytest.mark.parametrize("text", BAD)
def test_what_changes_the_graph_is_refused_with_a_reason_and_a_cure(text):
    message = describe_refused(["first", text])
    assert BAD[text] in message
    assert find_rule(text, REFUSED).cure in message
    assert text in message
    assert "first" not in message


@pytest.mark.parametrize("text", GOOD)
def test_what_is_known_to_be_harmless_passes_and_is_not_shown(text):
    assert describe_refused([text]) is None
    assert notable_warnings([text]) == ()


def test_what_is_not_known_passes_and_is_shown():
    assert describe_refused([UNKNOWN]) is None
    assert notable_warnings([GOOD[0], UNKNOWN]) == (UNKNOWN,)


def test_every_rule_is_tried_here():
    used = [rule for text in BAD if (rule := find_rule(text, REFUSED)) is not None]
    used += [rule for text in GOOD if (rule := find_rule(text, HARMLESS)) is not None]
    untried = {rule.pattern.pattern for rule in (*REFUSED, *HARMLESS) if rule not in used}
    assert untried == {"timing cache", "logger passed into .* differs"}
    assert all(rule.reason for rule in (*REFUSED, *HARMLESS))


def test_two_of_one_kind_are_one_reason():
    message = describe_refused(["Unused Input: a", "Unused Input: b"])
    assert "ignore the input(s) a, b:" in message
    assert message.count("Remove an input") == 1


def build_for_sm86(path, profile):
    plan = path.with_suffix(".plan")
    return build_engine(path, plan, [profile], target=RTX, compute_capability=(8, 6))


def test_a_real_build_that_drops_an_input_fails(tmp_path):
    inputs = [value("x", ["S", 8]), value("lengths", [2])]
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    path = save(tmp_path / "m.onnx", [node], inputs, [value("y", ["S", 8])])
    with pytest.raises(EngineError, match=r"ignore the input\(s\) lengths"):
        build_for_sm86(path, ProfileSpec("p", {"S": (1, 2, 4)}))
    assert leftovers(tmp_path) == []


def test_a_real_harmless_warning_is_kept_and_not_shown(tmp_path):
    path = save_scatter_attention(tmp_path / "m.onnx")
    result = build_for_sm86(path, ProfileSpec("p", {"S": (1, 1, 2)}))
    (text,) = result.warnings
    assert "input at has Int64 binding" in text
    assert notable_warnings(result.warnings) == ()


def test_a_precision_warning_of_a_build_fails_it(tmp_path, monkeypatch):
    """The rule is asked after the build: by a stand-in that warns as TensorRT 10.3 would."""
    real = fake_tensorrt_10_3.Builder.build_serialized_network

    def build_and_warn(self, network, config):
        severity = fake_tensorrt_10_3.Severity.WARNING
        self.logger.log(severity, "Detected layernorm nodes in FP16.")
        return real(self, network, config)

    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt_10_3)
    monkeypatch.setattr(fake_tensorrt_10_3.Builder, "build_serialized_network", build_and_warn)
    path, plan = save_relu(tmp_path / "m.onnx"), tmp_path / "m.plan"
    with pytest.raises(EngineError, match="Casts to FP32"):
        build_engine(
            path, plan, decoder_profiles(2048, 144, "fp16"), target=get_target("orin")
        )
    assert leftovers(tmp_path) == []
