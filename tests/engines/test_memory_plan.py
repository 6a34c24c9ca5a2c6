"""The memory plan's formulas against what builds with TensorRT-RTX 1.7.1 were measured at."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mvlm_export.engines.memory_plan import GraphLoad, ModelSizes, plan_memory
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_profiles import decoder_profiles

GIB = 1 << 30

# The 1.7B geometry, written out.
SIZES = ModelSizes(
    hidden=2048,
    ffn=5632,
    kv_width=2048,
    layers=24,
    vocab=32000,
    max_length=2048,
    vision_hidden=1024,
    vision_mlp=4096,
    vision_tokens=577,
    image_rows=576,
    image_size=336,
    image_tokens=144,
    images=1,
    width=2,
    cache_width=2,
    kv_form="append",
)
FP16 = (
    GraphLoad("vision_encoder", 581_600_000),
    GraphLoad("projector", 12_600_000),
    GraphLoad("decoder", 2_730_000_000),
)
LINEAR_WEIGHTS = 24 * (4 * 2048**2 + 3 * 2048 * 5632)
HEAD_WEIGHTS = 32000 * 2048


def test_cache_of_the_published_size():
    assert SIZES.cache == 24 * 2 * 2048 * 4096 == 402_653_184


@pytest.mark.parametrize(
    ("new", "past", "measured"), [(1024, 1024, 60.3e6), (1, 2047, 16.8e6), (2, 2046, 16.8e6)]
)
def test_decoder_scratch_is_what_builds_reported(new, past, measured):
    assert SIZES.decoder_scratch(new, past) == pytest.approx(measured, rel=0.02)


def test_decoder_scratch_of_the_fixed_form():
    """TensorScatter needs no copy of the past: 8.2 MB in a decode profile."""
    fixed = replace(SIZES, kv_form="fixed")
    assert fixed.decoder_scratch(1) == pytest.approx(8.2e6, rel=0.03)


def test_scratch_is_that_of_the_prefill_profile():
    for length in (2048, 512):
        sizes = replace(SIZES, max_length=length)
        prefill, _ = decoder_profiles(length, 144, "fp16")
        new, past = prefill.dims["S"][2], prefill.dims["T"][2]
        assert sizes.decoder_scratch() == sizes.decoder_scratch(new, past)
    assert SIZES.decoder_scratch() == pytest.approx(69.2e6, rel=0.01)
    assert SIZES.decoder_scratch(2048, 2047) == pytest.approx(121.6e6, rel=0.01)


def test_encoder_scratch_is_what_a_build_reported():
    assert SIZES.encoder_scratch == pytest.approx(17.4e6, rel=0.02)
    assert replace(SIZES, images=4).encoder_scratch == 4 * SIZES.encoder_scratch


# Peak RSS of a build holds the mapped weight file too. (weights, 4-bit weights, peak RSS)
BUILDS = {
    "encoder FP16": (594.9e6, 0, 2.06 * GIB),
    "encoder W8A8": (309e6, 0, 1.25 * GIB),
    "decoder FP16, P+D2": (2.597e9, 0, 7.69 * GIB),
    "decoder INT4, P+D": (768e6, LINEAR_WEIGHTS, 3.37 * GIB),
    "decoder INT4, P+D2": (768e6, LINEAR_WEIGHTS, 3.52 * GIB),
    "decoder INT4 with head, P+D": (671e6, LINEAR_WEIGHTS + HEAD_WEIGHTS, 3.25 * GIB),
}


@pytest.mark.parametrize("name", BUILDS)
def test_build_memory_is_near_what_was_measured_and_never_less(name):
    weights, four_bit, peak = BUILDS[name]
    formula = GraphLoad(name, int(weights), four_bit).build_host()
    assert 1.0 <= formula / (peak - weights) <= 1.16


def test_build_memory_of_six_layers_that_was_split_from_the_mapped_file():
    formula = GraphLoad("decoder", 714 << 20).build_host()
    assert 1.0 <= formula / (1614 << 20) <= 1.17


def test_the_plan_adds_up_and_says_how():
    plan = plan_memory(FP16, SIZES, get_target("orin-nano"))
    assert plan.run_bytes == sum(part.bytes for part in plan.run)
    names = {part.name for part in plan.run}
    assert {"decoder weights", "keys and values", "decoder scratch", "image buffers"} <= names
    assert all(part.how for part in (*plan.run, *plan.build, *plan.system))
    assert plan.available == (8 << 30) - sum(part.bytes for part in plan.system)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["verdict"] == plan.verdict
    assert data["run_bytes"] == plan.run_bytes


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        ("orin", "fits"),
        ("orin-nx", "fits"),
        ("orin-nano", "runs only"),
        ("orin-nano-4gb", "too small"),
        ("rtx", "unknown"),
        ("cpu", "unknown"),
    ],
)
def test_verdicts(target, verdict):
    assert plan_memory(FP16, SIZES, get_target(target)).verdict == verdict


@pytest.mark.parametrize(
    ("module", "seen"),
    [
        ("orin", 64_349_696 * 1024),
        ("orin-nx", 15655.6 * 2**20),
        ("orin-nano", 7_620_000 * 1024),
    ],
)
def test_firmware_keeps_what_devices_do_not_show_linux(module, seen):
    """MemTotal of recorded devices against what the plan leaves for Linux."""
    target = get_target(module)
    firmware = plan_memory(FP16, SIZES, target).system[0]
    assert firmware.name == "firmware"
    assert target.memory_bytes - firmware.bytes == pytest.approx(seen, rel=0.01)


def test_only_what_times_kernels_holds_the_weights_twice():
    device = plan_memory(FP16, SIZES, get_target("orin"))
    host = plan_memory(FP16, SIZES, get_target("rtx"))
    assert "timing" in {part.name for part in device.build}
    assert "timing" not in {part.name for part in host.build}
    assert plan_memory(FP16, SIZES, get_target("cpu")).build == ()


def test_the_largest_graph_decides_the_build():
    plan = plan_memory(FP16, SIZES, get_target("rtx"))
    assert plan.build_bytes == FP16[-1].build_host()
    four_bit = GraphLoad("decoder", 300_000_000, 2_000_000_000)
    heavier = plan_memory((*FP16[:2], four_bit), SIZES, get_target("rtx"))
    assert heavier.build_bytes == four_bit.build_host()
