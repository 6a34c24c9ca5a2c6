"""Modules, JetPack, power modes and clocks, from files as the devices have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvlm_export.engines.doctor import DoctorReport, examine
from mvlm_export.engines.jetson import Jetson, read_jetson
from mvlm_export.engines.jetson_modules import JETSON_MODULES, module_of_part, module_of_series
from mvlm_export.engines.jetson_power import GpuClock, Power, parse_modes, read_power
from mvlm_export.exporter.cli.doctor_command import (
    jetson_rows,
    reasons,
    speed_lines,
    verdict_rows,
)

RELEASE = (
    "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, "
    "DATE: Mon Jun 16 16:07:13 UTC 2025\n# KERNEL_VARIANT: oot\n"
)
NX_KIT = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
HEAD = """\
# Copyright (c) 2023-2024, NVIDIA CORPORATION.  All rights reserved.
###########################
# PARAM DEFINITIONS       #
###########################
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online

< PARAM TYPE=CLOCK NAME=GPU >
FREQ_TABLE /sys/devices/platform/17000000.gpu/devfreq/17000000.gpu/available_frequencies
MAX_FREQ /sys/devices/platform/17000000.gpu/devfreq/17000000.gpu/max_freq
MIN_FREQ /sys/devices/platform/17000000.gpu/devfreq/17000000.gpu/min_freq

< PARAM TYPE=CLOCK NAME=EMC >
MAX_FREQ /sys/kernel/nvpmodel_clk_cap/emc

"""


def write_modes(default: int, *modes: tuple[int, str, int, int]) -> str:
    """Text of nvpmodel.conf: (number, name, GPU cap, memory cap) each."""
    blocks = [
        f"< POWER_MODEL ID={number} NAME={name} >\nCPU_ONLINE CORE_0 1\nCPU_ONLINE CORE_1 1\n"
        "TPC_POWER_GATING TPC_PG_MASK 0\nGPU_POWER_CONTROL_ENABLE GPU_PWR_CNTL_EN on\n"
        f"CPU_A78_0 MIN_FREQ 729600\nCPU_A78_0 MAX_FREQ -1\nGPU MIN_FREQ 0\n"
        f"GPU MAX_FREQ {gpu}\nGPU_POWER_CONTROL_DISABLE GPU_PWR_CNTL_DIS auto\n"
        f"EMC MAX_FREQ {emc}\n\n"
        for number, name, gpu, emc in modes
    ]
    tail = (
        "# mandatory section to configure the default power mode\n"
        f"< PM_CONFIG DEFAULT={default} >\n< FAN_CONFIG DEFAULT=quiet >\n"
    )
    return HEAD + "".join(blocks) + tail


NANO_SUPER = write_modes(
    1,
    (0, "15W", 612_000_000, 2_133_000_000),
    (1, "25W", 918_000_000, 3_199_000_000),
    (2, "MAXN_SUPER", -1, -1),
    (3, "7W", 408_000_000, 2_133_000_000),
)
NANO = write_modes(
    0, (0, "15W", 624_750_000, 2_133_000_000), (1, "7W", 408_000_000, 2_133_000_000)
)
AGX = write_modes(
    2,
    (0, "MAXN", -1, 0),
    (1, "MODE_15W", 420_750_000, 2_133_000_000),
    (2, "MODE_30W", 624_750_000, 3_199_000_000),
    (3, "MODE_50W", 828_750_000, 3_199_000_000),
)
NX_SUPER = write_modes(
    3,
    (0, "MAXN_SUPER", -1, -1),
    (1, "10W", 612_000_000, 2_133_000_000),
    (2, "15W", 612_000_000, 2_133_000_000),
    (3, "25W", 408_000_000, 3_199_000_000),
    (4, "40W", 1_173_000_000, 3_199_000_000),
)
DPKG = """\
Package: nvidia-jetpack-runtime
Status: install ok installed
Version: 6.2.1+b38
Architecture: arm64

Package: nvidia-jetpack
Status: install ok installed
Priority: standard
Section: metapackages
Installed-Size: 194
Maintainer: NVIDIA Corporation
Architecture: arm64
Version: 6.2.1+b38
Depends: nvidia-jetpack-runtime (= 6.2.1+b38), nvidia-jetpack-dev (= 6.2.1+b38)
Description: NVIDIA Jetpack Meta Package
"""


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_nano(root: Path, mode: int = 1, clocks: tuple[int, int, int] | None = None) -> Path:
    """An Orin Nano developer kit in Super, as JetPack 6.2.1 leaves it."""
    tree = "proc/device-tree/"
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0"
    write(root, f"{tree}model", model)
    compatible = "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0"
    write(root, f"{tree}compatible", compatible)
    write(root, "proc/meminfo", "MemTotal:        7802064 kB\nMemAvailable:    5600000 kB\n")
    write(root, "etc/nv_tegra_release", RELEASE)
    write(root, "etc/nvpmodel.conf", NANO_SUPER)
    write(root, "var/lib/nvpmodel/status", f"pmode:{mode:04d}\n")
    write(root, "var/lib/dpkg/status", DPKG)
    low, high, now = clocks or (306_000_000, 918_000_000, 306_000_000)
    for name, value in (("min", low), ("max", high), ("cur", now)):
        write(root, f"sys/class/devfreq/17000000.gpu/{name}_freq", f"{value}\n")
        write(root, f"sys/class/devfreq/154c0000.nvenc/{name}_freq", "115200000\n")
    return root


# Modules


@pytest.mark.parametrize(
    ("compatible", "target", "part"),
    [
        ("nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0", "orin", "p3701-0005"),
        ("nvidia,p3737-0000+p3701-0004\0nvidia,tegra234\0", "orin-32gb", "p3701-0004"),
        ("nvidia,p3737-0000+p3701-0000\0nvidia,tegra234\0", "orin-32gb", "p3701-0000"),
        ("nvidia,p3768-0000+p3767-0000\0nvidia,tegra234\0", "orin-nx", "p3767-0000"),
        ("nvidia,p3768-0000+p3767-0000-super\0", "orin-nx-super", "p3767-0000"),
        ("nvidia,p3768-0000+p3767-0001\0", "orin-nx-8gb", "p3767-0001"),
        ("nvidia,p3768-0000+p3767-0001-super\0", "orin-nx-8gb-super", "p3767-0001"),
        ("nvidia,p3768-0000+p3767-0003-super\0", "orin-nano", "p3767-0003"),
        ("nvidia,p3768-0000+p3767-0005\0", "orin-nano-8gb", "p3767-0005"),
        ("nvidia,p3768-0000+p3767-0004\0", "orin-nano-4gb", "p3767-0004"),
        ("nvidia,p3768-0000+p3767-0004-super\0", "orin-nano-4gb-super", "p3767-0004"),
    ],
)
def test_the_part_number_names_the_module(tmp_path, compatible, target, part):
    write(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin\0")
    write(tmp_path, "proc/device-tree/compatible", compatible)
    jetson = read_jetson(tmp_path)
    assert jetson is not None
    assert (jetson.target, jetson.part) == (target, part)
    record = next(module for module in JETSON_MODULES if module.name == target)
    assert (jetson.module, jetson.series) == (record.title, record.series)


def test_the_device_trees_file_name_will_do(tmp_path):
    """JetPack 5 has it; the carrier board's number, p3737 or p3768, is none of a module."""
    write(tmp_path, "proc/device-tree/model", "NVIDIA Orin NX Developer Kit\0")
    path = "/dvs/git/dirty/hardware/nvidia/platform/t23x/p3768/kernel-dts/"
    name = f"{path}tegra234-p3767-0001-p3768-0000-a0.dts\0"
    write(tmp_path, "proc/device-tree/nvidia,dtsfilename", name)
    jetson = read_jetson(tmp_path)
    assert jetson is not None
    assert (jetson.target, jetson.part) == ("orin-nx-8gb", "p3767-0001")


@pytest.mark.parametrize(
    ("model", "kilobytes", "target"),
    [
        ("NVIDIA Jetson AGX Orin Developer Kit", 64_349_696, "orin"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 31_260_000, "orin-32gb"),
        (NX_KIT, 16_031_334, "orin-nx"),
        (f"{NX_KIT} Super", 16_031_334, "orin-nx-super"),
        (
            NX_KIT,
            7_759_462,
            "orin-nx-8gb",
        ),
        ("NVIDIA Jetson Orin Nano Developer Kit", 7_802_064, "orin-nano-8gb"),
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            7_802_064,
            "orin-nano",
        ),
        ("NVIDIA Jetson Orin Nano Developer Kit", 3_700_000, "orin-nano-4gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 128_000_000, None),
        ("NVIDIA Jetson AGX Xavier Developer Kit", 32_000_000, None),
    ],
)
def test_without_a_part_number_words_and_memory_do(tmp_path, model, kilobytes, target):
    write(tmp_path, "proc/device-tree/model", f"{model}\0")
    write(tmp_path, "proc/meminfo", f"MemTotal:       {kilobytes} kB\n")
    jetson = read_jetson(tmp_path)
    assert jetson is not None
    assert (jetson.target, jetson.part) == (target, None)


def test_unknown_parts_and_series_have_no_module():
    assert module_of_part("p3767-9999", super_mode=False) is None
    assert module_of_series("thor", 1 << 30, super_mode=False) is None
    with_super = module_of_part("p3701-0005", super_mode=True)
    assert with_super is not None
    assert with_super.name == "orin"


# JetPack


def test_jetpack_release(tmp_path):
    jetson = read_jetson(write_nano(tmp_path))
    assert jetson is not None
    assert (jetson.jetpack_release, jetson.jetpack, jetson.l4t) == ("6.2.1", 6, "36.4.4")


@pytest.mark.parametrize(
    "status",
    [
        "",
        DPKG.split("\n\n")[0],
        DPKG.replace("install ok installed", "deinstall ok config-files"),
    ],
)
def test_jetpack_that_is_not_installed_has_no_release(tmp_path, status):
    write_nano(tmp_path)
    write(tmp_path, "var/lib/dpkg/status", status)
    jetson = read_jetson(tmp_path)
    assert jetson is not None
    assert (jetson.jetpack_release, jetson.jetpack) == (None, 6)


# Power


@pytest.mark.parametrize(
    ("text", "fastest", "default"),
    [
        (NANO_SUPER, (2, "MAXN_SUPER"), 1),
        (NANO, (0, "15W"), 0),
        (AGX, (0, "MAXN"), 2),
        (NX_SUPER, (0, "MAXN_SUPER"), 3),
        ("< POWER_MODEL ID=0 NAME=10W >\n< POWER_MODEL ID=1 NAME=MAXN >\n", (1, "MAXN"), None),
        ("< POWER_MODEL ID=0 NAME=10W >\n< POWER_MODEL ID=1 NAME=20W >\n", (1, "20W"), None),
    ],
)
def test_the_fastest_mode_is_that_which_caps_least(text, fastest, default):
    modes, first = parse_modes(text)
    best = max(modes.values(), key=lambda mode: mode.speed)
    assert (best.number, best.name) == fastest
    assert first == default


def test_caps_of_each_mode_are_its_own():
    modes, _ = parse_modes(NANO_SUPER)
    assert list(modes) == [0, 1, 2, 3]
    assert modes[1].caps == {"GPU": 918_000_000, "EMC": 3_199_000_000}
    assert modes[2].caps == {}


def test_a_slow_mode_is_told_how_to_be_fast(tmp_path):
    power = read_power(write_nano(tmp_path, mode=0))
    assert power.mode is not None
    assert (power.mode.name, power.full_speed) == ("15W", False)
    assert power.advice == ("sudo nvpmodel -m 2", "sudo jetson_clocks")
    assert power.gpu == GpuClock(306_000_000, 918_000_000, 306_000_000)
    assert not power.gpu.locked


def test_the_fastest_mode_with_free_clocks_needs_jetson_clocks(tmp_path):
    free = (306_000_000, 1_020_000_000, 612_000_000)
    power = read_power(write_nano(tmp_path, mode=2, clocks=free))
    assert (power.full_speed, power.advice) == (False, ("sudo jetson_clocks",))


def test_full_speed(tmp_path):
    power = read_power(write_nano(tmp_path, mode=2, clocks=(1_020_000_000,) * 3))
    assert (power.full_speed, power.advice) == (True, ())


def test_the_memory_clock_is_shown_where_root_may_read_it(tmp_path):
    write_nano(tmp_path)
    assert read_power(tmp_path).memory_clock is None
    write(tmp_path, "sys/kernel/debug/bpmp/debug/clk/emc/rate", "3199000000\n")
    assert read_power(tmp_path).memory_clock == 3_199_000_000


def test_before_the_first_change_the_default_mode_holds(tmp_path):
    write_nano(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").unlink()
    mode = read_power(tmp_path).mode
    assert mode is not None
    assert mode.name == "25W"


def test_older_kernels_call_the_gpu_by_its_chip(tmp_path):
    for name in ("min", "max", "cur"):
        write(tmp_path, f"sys/class/devfreq/17000000.ga10b/{name}_freq", "1300500000\n")
    power = read_power(tmp_path)
    assert power.gpu is not None
    assert power.gpu.locked
    assert power.full_speed is None  # of the mode nothing is known


def test_where_nothing_can_be_read_nothing_is_claimed(tmp_path):
    assert read_power(tmp_path) == Power(None, None, None, None, None, ())


# What the doctor shows


def report_of(root: Path) -> DoctorReport:
    return examine(root)


def test_doctor_shows_module_jetpack_mode_and_clocks(tmp_path):
    report = report_of(write_nano(tmp_path, mode=0))
    jetson = report.machine.jetson
    assert jetson is not None
    rows = dict(jetson_rows(jetson))
    assert rows["module"] == "Jetson Orin Nano 8GB (Super), p3767-0005 (--target orin-nano)"
    assert rows["JetPack"] == "6.2.1 (Jetson Linux 36.4.4)"
    assert rows["power mode"] == "15W (mode 0)"
    assert rows["GPU clock"] == "306 to 918 MHz, now 306"
    (line,) = speed_lines(report.machine)
    assert line.startswith("speed: no, its fastest mode is MAXN_SUPER.")
    assert "sudo nvpmodel -m 2 && sudo jetson_clocks" in line


def test_doctor_is_content_at_full_speed(tmp_path):
    fast = report_of(write_nano(tmp_path, mode=2, clocks=(1_020_000_000,) * 3))
    (line,) = speed_lines(fast.machine)
    assert line.startswith("speed: yes")


def test_doctor_says_that_clocks_follow_the_load(tmp_path):
    report = report_of(write_nano(tmp_path, mode=2))
    (line,) = speed_lines(report.machine)
    assert line == "speed: no, its clocks follow the load. Cure: sudo jetson_clocks."


def test_doctors_json_holds_the_same(tmp_path):
    report = report_of(write_nano(tmp_path, mode=0))
    data = json.loads(json.dumps(report.to_json()))["machine"]["jetson"]
    assert data["module"] == "Jetson Orin Nano 8GB (Super)"
    assert data["jetpack_release"] == "6.2.1"
    assert data["power"]["mode"]["name"] == "15W"
    assert data["power"]["advice"] == ["sudo nvpmodel -m 2", "sudo jetson_clocks"]
    assert data["power"]["full_speed"] is False


def test_doctors_table_has_a_row_for_each_series(tmp_path):
    report = report_of(write_nano(tmp_path))
    rows = {row[0]: row[1:] for row in verdict_rows(report)}
    assert len(rows) == 6
    names = "orin-nano, orin-nano-8gb, orin-nano-4gb-super, orin-nano-4gb"
    assert rows[names][0] == "Jetson Orin Nano, JetPack 6 (TensorRT 10.3)"
    lines = reasons(report)
    assert any(line.startswith("build orin-nano: no") for line in lines)


def test_doctor_off_jetson_says_nothing_of_speed():
    machine = report_of(Path("/nonexistent")).machine
    assert machine.jetson is None
    assert speed_lines(machine) == []


def test_a_jetson_without_power_files_shows_what_it_has():
    jetson = Jetson("NVIDIA Jetson AGX Thor Developer Kit", None, None, None)
    assert jetson_rows(jetson) == [
        ("Jetson", "NVIDIA Jetson AGX Thor Developer Kit"),
        ("JetPack", "unknown (unknown Jetson Linux)"),
    ]
