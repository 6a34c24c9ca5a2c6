"""Target records: figures, JetPacks, and what a wrong name is told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.jetson_modules import ALIASES, JETSON_MODULES
from mvlm_export.engines.targets import RTX_GPUS, TARGETS, get_target

JETSONS = [target for target in TARGETS.values() if target.jetpack is not None]


def test_names_are_the_ones_of_the_command_line():
    assert {"orin", "orin-nx", "orin-nano", "rtx", "cpu", "cuda"} <= set(TARGETS)
    assert len(TARGETS) == 10 + 1 + 6 + 2
    assert all(target.name == name for name, target in TARGETS.items())


# What NVIDIA's data sheets print: memory, GB/s, and dense 8-bit TOPS of the GPU alone.
SHEETS = {
    "orin": (64, 204.8, 170 / 2),
    "orin-32gb": (32, 204.8, 108 / 2),
    "orin-nx": (16, 102.4, (100 - 40) / 2),
    "orin-nx-super": (16, 102.4, (157 - 80) / 2),
    "orin-nx-8gb": (8, 102.4, (70 - 20) / 2),
    "orin-nx-8gb-super": (8, 102.4, (117 - 40) / 2),
    "orin-nano": (8, 102, 67 / 2),
    "orin-nano-8gb": (8, 68, 40 / 2),
    "orin-nano-4gb-super": (4, 51, 34 / 2),
    "orin-nano-4gb": (4, 34, 20 / 2),
}


@pytest.mark.parametrize("name", SHEETS)
def test_jetson_modules(name):
    target = get_target(name)
    memory, bandwidth, tops = SHEETS[name]
    assert (target.memory_gb, target.bandwidth_gb_s) == (memory, bandwidth)
    assert target.int8_tops == pytest.approx(tops, rel=0.03)
    assert target.fp16_tflops == pytest.approx(tops / 2, rel=0.03)
    assert target.memory_bytes == memory << 30
    assert target.compute_capability == (8, 7)
    assert target.runtime == "tensorrt"
    assert not target.builds_on_host


def test_every_module_has_a_sheet():
    assert {target.name for target in JETSONS} == set(SHEETS)


@pytest.mark.parametrize("name", SHEETS)
def test_modules_of_a_series_are_given_the_same_graphs(name):
    target = get_target(name)
    for other in (t for t in JETSONS if t.series == target.series):
        graphs = ("tensorrt_version", "opset_ceiling", "ir_ceiling", "op_set", "dtypes")
        assert all(getattr(other, key) == getattr(target, key) for key in graphs)
        assert other.kv_form == target.kv_form


def test_a_name_in_full_is_the_short_one():
    for long, short in ALIASES.items():
        assert get_target(long) is get_target(short)
        assert long not in TARGETS
    assert get_target("orin-nano-8gb-super", 7) == get_target("orin-nano", 7)
    assert get_target("orin-nano-super").bandwidth_gb_s == 102


def test_super_differs_in_clocks_alone():
    by_part = {}
    for module in JETSON_MODULES:
        by_part.setdefault(module.parts, []).append(module)
    pairs = [modules for modules in by_part.values() if len(modules) == 2]
    assert len(pairs) == 4
    for pair in pairs:
        slow, fast = sorted(pair, key=lambda module: module.super_mode)
        assert (slow.super_mode, fast.super_mode) == (False, True)
        assert (slow.memory_gb, slow.gpu_sms) == (fast.memory_gb, fast.gpu_sms)
        assert slow.gpu_ghz < fast.gpu_ghz
        assert slow.bandwidth_gb_s <= fast.bandwidth_gb_s


def test_rtx_has_a_record_for_each_gpu_that_its_package_knows():
    import tensorrt_rtx

    known = {
        name
        for name in dir(tensorrt_rtx.ComputeCapability)
        if name.startswith("SM") and name[2:].isdigit()
    }
    assert known == {f"SM{major}{minor}" for major, minor in RTX_GPUS}
    for (major, minor), _ in RTX_GPUS.items():
        target = get_target(f"rtx-sm{major}{minor}")
        assert target.compute_capability == (major, minor)
        assert target.series == get_target("rtx").series
        assert (target.follows_gpu, get_target("rtx").follows_gpu) == (False, True)
        assert target.plan_folder("1.7.1").endswith(f"sm{major}{minor}")
        assert ("BFLOAT16" in target.dtypes) == ((major, minor) >= (8, 0))


def test_where_the_gpu_varies_no_peak_is_claimed():
    for name in ("rtx", "rtx-sm89", "cpu", "cuda"):
        target = get_target(name)
        assert (target.fp16_tflops, target.int8_tops, target.memory_bytes) == (None,) * 3


def test_jetpack_decides_tensorrt_and_operators():
    six, seven = get_target("orin"), get_target("orin", jetpack=7)
    assert six == get_target("orin", jetpack=6)
    assert (six.tensorrt_version, six.opset_ceiling, six.ir_ceiling) == ((10, 3), 21, 10)
    assert seven.tensorrt_version == (10, 16)
    assert six.op_set != seven.op_set
    assert "JetPack 6 (TensorRT 10.3)" in six.title
    assert "JetPack 7 (TensorRT 10.16)" in seven.title
    assert seven.title.count("JetPack") == 1


def test_cache_form_is_the_one_that_the_runtime_has_an_operator_for():
    fixed = {name for name, target in TARGETS.items() if target.kv_form == "fixed"}
    assert fixed == {"cpu"}
    for name in SHEETS:
        assert get_target(name, jetpack=7).kv_form == "fixed"
        assert get_target(name, jetpack=6).kv_form == "append"


def test_no_orin_type_list_has_fp8_and_none_lacks_int4():
    for target in TARGETS.values():
        assert not any(dtype.startswith("FLOAT8") for dtype in target.dtypes)
        assert {"INT4", "INT8", "FLOAT16", "FLOAT"} <= target.dtypes
        assert target.io_only_dtypes <= target.dtypes


def test_rtx_builds_anywhere_for_orins_nearest_kin():
    rtx = get_target("rtx")
    assert rtx.builds_on_host
    assert rtx.compute_capability == (8, 6)
    assert rtx.has_engines
    assert not rtx.times_kernels


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_onnxruntime_targets_have_no_engines(name):
    target = get_target(name)
    assert not target.has_engines
    assert target.op_set is None
    with pytest.raises(InputError, match="no engines"):
        target.plan_folder("10.3.0")


def test_plan_folder():
    assert get_target("orin").plan_folder("10.3.0") == "orin-trt10.3.0-sm87"
    assert get_target("rtx").plan_folder("1.7.1", (12, 0)) == "rtx-trt1.7.1-sm120"


def test_records_are_frozen_and_print_as_json():
    target = get_target("orin")
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.name = "thor"  # type: ignore[misc]
    data = json.loads(json.dumps(target.to_json()))
    assert data["tensorrt_version"] == [10, 3]
    assert data["dtypes"] == sorted(target.dtypes)


def test_unknown_name_is_told_the_known_ones_and_a_near_one():
    with pytest.raises(InputError) as caught:
        get_target("orinnx")
    message = str(caught.value)
    assert "Did you mean 'orin-nx'?" in message
    assert all(name in message for name in TARGETS)


def test_unknown_name_far_from_all_gets_no_guess():
    with pytest.raises(InputError, match=r"^There is no target 'quux'\. Known: orin"):
        get_target("quux")


def test_jetpack_of_what_is_no_jetson_is_refused():
    with pytest.raises(InputError, match="no Jetson"):
        get_target("cpu", jetpack=6)


def test_unknown_jetpack_is_refused():
    with pytest.raises(InputError, match=r"JetPack 5 is not known.*choose 6 or 7"):
        get_target("orin", jetpack=5)
