"""Packages and devices, and TensorRT 10.3's API by a module that has its names alone."""

from __future__ import annotations

import sys

import pytest

from mvlm_export.engines import trt_api, trt_builder
from mvlm_export.engines.errors import EngineError, InputError, MissingPackageError
from mvlm_export.engines.gpu_probe import GpuInfo, probe_gpu
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import (
    BuildOptions,
    build_engine,
    decoder_profiles,
    engine_capability,
)

from . import fake_tensorrt_10_3
from .trt_graphs import RTX, leftovers, save_relu


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same results on a machine with a GPU."""
    absent = probe_gpu("libno-such-driver.so")
    monkeypatch.setattr(trt_builder, "probe_gpu", lambda: absent)


# Packages and devices


def test_target_without_engines(tmp_path):
    path = save_relu(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="builds no engines"):
        build_engine(path, tmp_path / "m.plan", [], target=get_target("cpu"))


def test_missing_tensorrt_tells_of_jetpack_and_virtual_environments(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingPackageError, match=r"(?s)python3-libnvinfer.*system-site-pack"):
        trt_api.load_tensorrt("tensorrt")


def test_missing_rtx_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingPackageError, match=r"mvlm-export\[rtx\]"):
        trt_api.load_tensorrt("tensorrt_rtx")


# TensorRT 10.3, by a module that has its names alone


@pytest.fixture
def tensorrt_10_3(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt_10_3)
    return fake_tensorrt_10_3


def build_for_orin(tmp_path, target="orin", jetpack=None, **options):
    path = save_relu(tmp_path / "decoder.onnx")
    profiles = decoder_profiles(2048, 144, "fp16")
    record = get_target(target, jetpack)
    return build_engine(path, tmp_path / "decoder.plan", profiles, target=record, **options)


def test_10_3_strongly_typed_by_its_own_number_and_no_precision_flag(tmp_path, tensorrt_10_3):
    result = build_for_orin(tmp_path, options=BuildOptions(1 << 30, 4))
    builder = tensorrt_10_3.Builder.last
    assert builder.network.flags == 1 << 1
    assert builder.config.flags == []
    assert builder.config.pools == {tensorrt_10_3.MemoryPoolType.WORKSPACE: 1 << 30}
    assert builder.config.builder_optimization_level == 4
    assert len(builder.config.profiles) == 2
    assert builder.config.profiles[0].shapes == {
        "input_ids": ((1,), (256,), (1024,)),
        "image_embeds": ((1, 64), (144, 64), (144, 64)),
        "past_key_values.0.key": ((0, 4, 16), (0, 4, 16), (2047, 4, 16)),
        "past_key_values.0.value": ((0, 4, 16), (0, 4, 16), (2047, 4, 16)),
    }
    assert result.plan_path.read_bytes() == b"a plan of TensorRT 10.3"
    assert (result.kind, result.tensorrt_version) == ("tensorrt", "10.3.0")
    assert result.compute_capability == (8, 7)
    assert result.activation_memory == {"prefill": 100, "decode": 100}
    assert result.weights_memory == 4096
    assert result.warnings == ()


def test_10_3_timing_cache_is_read_and_written(tmp_path, tensorrt_10_3):
    cache = tmp_path / "timing.cache"
    build_for_orin(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"timings:"
    build_for_orin(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"timings:timings:"


def test_10_3_timing_cache_of_another_device_starts_anew(tmp_path, tensorrt_10_3):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"of another device")
    result = build_for_orin(tmp_path, timing_cache=cache)
    assert cache.read_bytes() == b"timings:"
    assert "start anew" in result.warnings[0]


def test_another_tensorrt_than_the_graphs_were_made_for_is_a_warning(tmp_path, tensorrt_10_3):
    result = build_for_orin(tmp_path, jetpack=7)
    assert result.warnings == ("graphs made for TensorRT 10.16, built by 10.3.0",)


def test_orin_engine_is_refused_on_another_gpu(tmp_path, tensorrt_10_3, monkeypatch):
    other = GpuInfo("NVIDIA RTX 4090", (8, 9), None)
    monkeypatch.setattr(trt_builder, "probe_gpu", lambda: other)
    with pytest.raises(EngineError, match=r"8\.9.*8\.7.*mvlm build BUNDLE"):
        build_for_orin(tmp_path)
    assert leftovers(tmp_path) == []


def test_too_old_tensorrt(monkeypatch):
    class Flags:
        EXPLICIT_BATCH = 0

    old = type(sys)("tensorrt")
    old.__version__, old.NetworkDefinitionCreationFlag = "8.5.2", Flags
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EngineError, match=r"8\.5\.2 knows no strongly typed"):
        trt_api.load_tensorrt("tensorrt")


def test_engines_built_anywhere_are_for_the_gpu_found(monkeypatch):
    assert engine_capability(RTX) == (8, 6)
    found = GpuInfo("NVIDIA RTX 4090", (8, 9), None)
    monkeypatch.setattr(trt_builder, "probe_gpu", lambda: found)
    assert engine_capability(RTX) == (8, 9)
    assert engine_capability(get_target("orin")) == (8, 7)
    assert engine_capability(get_target("cpu")) is None
