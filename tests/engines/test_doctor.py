"""Recorded Jetson files, and verdicts on machines of many kinds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm_export.engines import doctor
from mvlm_export.engines.doctor import Machine, examine, judge, read_memory
from mvlm_export.engines.gpu_probe import GpuInfo, probe_gpu
from mvlm_export.engines.jetson import Jetson, read_jetson, this_device_is
from mvlm_export.engines.targets import TARGETS, get_target

NO_GPU = GpuInfo(None, None, "no NVIDIA driver")
ORIN_GPU = GpuInfo("Orin", (8, 7), None)

# As the devices have them.
JETPACK_6 = (
    "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, "
    "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: oot\n"
    "TARGET_USERSPACE_LIB_DIR=nvidia\nTARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia\n"
)
JETPACK_7 = (
    "# R39 (release), REVISION: 2.0, GCID: 45000000, BOARD: generic, EABI: aarch64, "
    "DATE: Mon Jun  1 00:00:00 UTC 2026\n# KERNEL_VARIANT: oot\n"
)
JETPACK_5 = "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref, EABI: aarch64\n"
MEMINFO = "MemTotal:       64349696 kB\nMemFree:  1 kB\nMemAvailable:   60000000 kB\n"


def write_jetson(root: Path, model: str | None, release: str | None) -> Path:
    (root / "proc" / "device-tree").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "proc" / "meminfo").write_text(MEMINFO)
    if model is not None:
        (root / "proc" / "device-tree" / "model").write_bytes(model.encode() + b"\0")
    if release is not None:
        (root / "etc" / "nv_tegra_release").write_text(release)
    return root


@pytest.mark.parametrize(
    ("model", "release", "expected"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", JETPACK_6, ("36.4.3", 6, "orin")),
        ("NVIDIA Jetson AGX Orin Developer Kit", JETPACK_7, ("39.2.0", 7, "orin")),
        (
            "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
            JETPACK_6,
            ("36.4.3", 6, "orin-nx"),
        ),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            JETPACK_6,
            ("36.4.3", 6, "orin-nano"),
        ),
        ("NVIDIA Jetson AGX Orin Developer Kit", JETPACK_5, ("35.4.1", 5, "orin")),
        ("NVIDIA Jetson AGX Thor Developer Kit", JETPACK_7, ("39.2.0", 7, None)),
        ("NVIDIA Jetson AGX Orin Developer Kit", None, (None, None, "orin")),
        ("NVIDIA Orin NX Developer Kit", None, (None, None, "orin-nx")),
    ],
)
def test_recorded_devices(tmp_path, model, release, expected):
    jetson = read_jetson(write_jetson(tmp_path, model, release))
    assert jetson is not None
    assert (jetson.model, jetson.l4t, jetson.jetpack, jetson.target) == (model, *expected)


def test_release_file_alone_is_a_jetson_of_unknown_model(tmp_path):
    jetson = read_jetson(write_jetson(tmp_path, None, JETPACK_6))
    assert jetson is not None
    assert jetson.model == "NVIDIA Jetson (unknown model)"
    assert (jetson.l4t, jetson.jetpack, jetson.target) == ("36.4.3", 6, None)


@pytest.mark.parametrize("model", [None, "Raspberry Pi 5 Model B Rev 1.0"])
def test_other_machines_are_no_jetson(tmp_path, model):
    assert read_jetson(write_jetson(tmp_path, model, None)) is None


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", ["orin", "orin-32gb"]),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            ["orin-nano", "orin-nano-8gb", "orin-nano-4gb-super", "orin-nano-4gb"],
        ),
        ("NVIDIA Jetson AGX Thor Developer Kit", []),
        ("Raspberry Pi 5 Model B Rev 1.0", []),
        (None, []),
    ],
)
def test_this_device_is_a_series_or_none(tmp_path, model, names):
    write_jetson(tmp_path, model, None)
    assert [n for n in TARGETS if this_device_is(get_target(n), tmp_path)] == names


def test_this_device_whatever_its_jetpack(tmp_path):
    write_jetson(tmp_path, "NVIDIA Jetson AGX Orin Developer Kit", JETPACK_6)
    assert this_device_is(get_target("orin", 7), tmp_path)


@pytest.mark.parametrize(
    ("l4t", "expected"),
    [
        (None, None),
        ("35.4.1", False),
        ("36.2.0", False),
        ("36.3.0", False),
        ("36.4.0", True),
        ("36.10", True),
        ("38.2.0", True),
    ],
)
def test_the_release_that_brought_tensorrt_10(l4t, expected):
    assert replace(DEVICE.jetson, l4t=l4t).has_tensorrt_10 is expected


def test_memory(tmp_path):
    write_jetson(tmp_path, None, None)
    assert read_memory(tmp_path) == (64349696 * 1024, 60000000 * 1024)
    assert read_memory(tmp_path / "absent") == (None, None)


# Verdicts

PC = Machine(
    python="3.11.7",
    os="Linux 6.8",
    architecture="x86_64",
    jetson=None,
    gpu=NO_GPU,
    memory_total=24 << 30,
    memory_available=20 << 30,
    disk_free=100 << 30,
    packages={
        "numpy": "2.0",
        "torch": "2.13.0",
        "onnx": "1.23.2",
        "onnx_ir": "0.2.0",
        "onnxscript": "0.7.2",
        "safetensors": "0.8.0",
        "onnxruntime": "1.31.1",
        "tensorrt_rtx": "1.7.1",
        "tensorrt": None,
    },
    providers=("CPUExecutionProvider",),
)
DEVICE = replace(
    PC,
    architecture="aarch64",
    jetson=Jetson(
        "NVIDIA Jetson AGX Orin Developer Kit", "36.4.3", 6, "orin", series="agx-orin"
    ),
    gpu=ORIN_GPU,
    packages={"numpy": "1.26", "tensorrt": "10.3.0"},
    providers=(),
)


def verdict(machine, name):
    return next(v for v in judge(machine) if v.target == name)


def test_every_target_gets_a_verdict_and_every_no_a_reason():
    for machine in (PC, DEVICE):
        verdicts = judge(machine)
        assert [v.target for v in verdicts] == list(TARGETS)
        for entry in verdicts:
            for ability in (entry.compile, entry.build, entry.run):
                assert ability.reason
                assert ability.ok or ability.cure


def test_pc_compiles_all_builds_rtx_and_runs_all_but_cuda():
    assert all(v.compile.ok for v in judge(PC))
    builds = {v.target for v in judge(PC) if v.build.ok}
    assert builds == {name for name, target in TARGETS.items() if target.builds_on_host}
    assert {"rtx", "rtx-sm89", "cpu", "cuda"} <= builds
    assert {v.target for v in judge(PC) if not v.run.ok} == {"cuda"}
    orin = verdict(PC, "orin").build
    assert "on the device itself" in orin.reason
    assert "mvlm build BUNDLE" in orin.cure
    assert "mvlm-export[gpu]" in verdict(PC, "cuda").run.cure


WITH_GPU = replace(
    PC,
    gpu=GpuInfo("GeForce RTX 4070", (8, 9), None),
    packages={**PC.packages, "cuda": "13.0.1"},
)
READY = replace(DEVICE, packages={**DEVICE.packages, "cuda": "12.6.2"})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("orin", "no TensorRT plans: its engines are built on the device itself"),
        ("rtx", "no TensorRT-RTX plans: no NVIDIA driver"),
    ],
)
def test_without_the_gpu_graphs_run_on_the_cpu(name, why):
    run = verdict(PC, name).run
    assert run.ok
    assert run.reason == f"its graphs run through onnxruntime 1.31.1 on the CPU; {why}"


def test_plans_run_where_they_are_built_with_cuda_python():
    assert verdict(READY, "orin").run.reason == "TensorRT 10.3.0 of JetPack 6, on Orin"
    assert "on GeForce RTX 4070" in verdict(WITH_GPU, "rtx").run.reason
    assert not verdict(READY, "orin-nx").run.ok
    for machine, name in ((READY, "orin"), (WITH_GPU, "rtx")):
        packages = {**machine.packages, "cuda": None, "onnxruntime": "1.31.1"}
        lacking = replace(machine, packages=packages, providers=PC.providers)
        assert "plans: cuda-python not installed" in verdict(lacking, name).run.reason


def test_a_runtime_without_a_backend_runs_no_plans(monkeypatch):
    monkeypatch.delitem(doctor.BACKENDS, "tensorrt_rtx", raising=False)
    assert "plans are not executed yet" in verdict(WITH_GPU, "rtx").run.reason


@pytest.mark.parametrize("name", ["orin", "rtx", "cpu"])
def test_with_neither_plans_nor_onnxruntime_nothing_runs(name):
    run = verdict(DEVICE, name).run
    assert not run.ok
    assert run.reason.endswith("onnxruntime not installed")
    assert "mvlm-export[cpu]" in run.cure


@pytest.mark.parametrize("package", ["torch", "onnx", "onnx_ir", "onnxscript", "safetensors"])
def test_compiling_needs_each_package(package):
    machine = replace(PC, packages={**PC.packages, package: None})
    for entry in judge(machine):
        assert not entry.compile.ok
        assert entry.compile.reason == f"{package} not installed"
        assert "mvlm-export[export]" in entry.compile.cure


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"packages": {**PC.packages, "onnxruntime": None}}, "onnxruntime not installed"),
        ({"providers": (), "provider_problem": "libX missing"}, "libX missing"),
    ],
)
def test_compiling_without_onnxruntime_leaves_parity_out(changes, reason):
    ability = verdict(replace(PC, **changes), "rtx").compile
    assert ability.ok
    assert reason in ability.reason
    assert "--no-parity" in ability.reason
    assert "parity" not in verdict(PC, "rtx").compile.reason


def test_device_builds_bundles_of_its_series_alone():
    orin = verdict(DEVICE, "orin")
    assert orin.build.ok
    assert orin.build.reason == "TensorRT 10.3.0 of JetPack 6"
    assert not orin.compile.ok
    assert "mvlm-export[export]" in orin.compile.cure
    assert "torch" in orin.compile.reason
    assert verdict(DEVICE, "orin-32gb").build == orin.build
    other = verdict(DEVICE, "orin-nx").build
    assert not other.ok
    assert other.cure == "choose --target orin"


@pytest.mark.parametrize("l4t", ["36.2.0", "36.3.0"])
def test_jetpack_6_0_has_too_old_a_tensorrt(l4t):
    jetson = replace(DEVICE.jetson, l4t=l4t)
    for packages, reason in (
        ({"tensorrt": "8.6.2"}, "TensorRT 8.6.2 of JetPack 6 is older than 10.3"),
        ({}, f"Jetson Linux {l4t} comes with TensorRT 8"),
    ):
        build = verdict(replace(DEVICE, jetson=jetson, packages=packages), "orin").build
        assert (build.ok, build.reason) == (False, reason)
        assert build.cure == "install JetPack 6.1 or newer"


@pytest.mark.parametrize(
    ("installed", "ok"),
    [
        ("10.3.0", True),
        ("10.16.1.11", True),
        ("10.2.9", False),
        ("8.6.2", False),
        ("?", False),
    ],
)
def test_in_a_container_the_installed_tensorrt_decides(installed, ok):
    jetson = replace(DEVICE.jetson, l4t=None, jetpack=None)
    machine = replace(DEVICE, jetson=jetson, packages={"tensorrt": installed})
    build = verdict(machine, "orin").build
    assert build.ok is ok
    assert build.reason.startswith(f"TensorRT {installed} of an unknown JetPack")


def test_in_a_container_without_tensorrt_no_jetpack_is_denied():
    jetson = replace(DEVICE.jetson, l4t=None, jetpack=None)
    build = verdict(replace(DEVICE, jetson=jetson, packages={}), "orin").build
    assert (build.ok, build.reason) == (False, "Python does not see TensorRT")


def test_targets_of_a_series_have_one_verdict():
    """What the doctor's table rests on, which has a row for each series."""
    for machine in (PC, DEVICE):
        found = {}
        for entry in judge(machine):
            words = (entry.compile, entry.build, entry.run)
            assert found.setdefault(entry.series, words) == words


def test_jetpack_7_is_named_with_its_tensorrt():
    jetson = replace(DEVICE.jetson, l4t="39.2.0", jetpack=7)
    machine = replace(DEVICE, jetson=jetson, packages={"tensorrt": "10.16.1.11"})
    orin = verdict(machine, "orin")
    assert "JetPack 7 (TensorRT 10.16)" in orin.title
    assert orin.build.ok
    older = verdict(replace(machine, packages={"tensorrt": "10.3.0"}), "orin").build
    assert (older.ok, "older than 10.16" in older.reason) == (False, True)


def test_old_jetpack_is_told_to_update():
    jetson = replace(DEVICE.jetson, l4t="35.4.1", jetpack=5)
    build = verdict(replace(DEVICE, jetson=jetson), "orin").build
    assert not build.ok
    assert "35.4.1" in build.reason
    assert "JetPack 6.1" in build.cure


def test_tensorrt_hidden_from_a_virtual_environment():
    build = verdict(replace(DEVICE, packages={}), "orin").build
    assert not build.ok
    assert "--system-site-packages" in build.cure


def test_missing_and_broken_onnxruntime():
    missing = verdict(replace(PC, packages={}), "cpu").run
    assert (missing.ok, missing.reason) == (False, "onnxruntime not installed")
    broken = verdict(replace(PC, providers=(), provider_problem="libX missing"), "cpu").run
    assert "does not load: libX missing" in broken.reason


def test_cuda_provider_needs_a_gpu_too():
    offered = replace(PC, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert not verdict(offered, "cuda").run.ok
    assert verdict(replace(offered, gpu=ORIN_GPU), "cuda").run.ok


def test_missing_rtx_names_the_extra():
    bare = replace(PC, packages={})
    assert "mvlm-export[rtx]" in verdict(bare, "rtx").build.cure


# This machine


def test_examine_this_machine(tmp_path):
    report = examine(write_jetson(tmp_path, "NVIDIA Jetson AGX Orin Developer Kit", JETPACK_6))
    machine = report.machine
    assert machine.jetson.target == "orin"
    assert machine.memory_total == 64349696 * 1024
    assert machine.disk_free > 0
    assert machine.packages["numpy"]
    assert machine.packages["tensorrt_rtx"]
    assert "CPUExecutionProvider" in machine.providers
    assert json.loads(json.dumps(report.to_json()))["targets"][0]["target"] == "orin"


def test_broken_onnxruntime_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    providers, problem = doctor.read_providers()
    assert providers == ()
    assert "onnxruntime" in problem


def test_absent_driver_is_a_reason_and_no_exception():
    gpu = probe_gpu("libno-such-driver.so")
    assert not gpu.present
    assert "libno-such-driver.so" in gpu.problem


def test_examining_imports_neither_torch_nor_onnx_nor_tensorrt():
    code = (
        "import sys; from mvlm_export.engines.doctor import examine; examine()\n"
        "heavy = {'torch', 'onnx', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
