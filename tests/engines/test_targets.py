"""Target records: figures, JetPacks, and what a wrong name is told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mvlm_export.engines.errors import InputError
from mvlm_export.engines.targets import TARGETS, get_target


def test_names_are_the_ones_of_the_command_line():
    assert list(TARGETS) == ["orin", "orin-nx", "orin-nano", "rtx", "cpu", "cuda"]
    assert all(target.name == name for name, target in TARGETS.items())


@pytest.mark.parametrize(
    ("name", "memory", "bandwidth"),
    [("orin", 64, 204.8), ("orin-nx", 16, 102.4), ("orin-nano", 8, 102)],
)
def test_jetson_modules(name, memory, bandwidth):
    target = get_target(name)
    assert (target.memory_gb, target.bandwidth_gb_s) == (memory, bandwidth)
    assert target.compute_capability == (8, 7)
    assert target.runtime == "tensorrt"
    assert not target.builds_on_host


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
    for name in ("orin", "orin-nx", "orin-nano"):
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
