"""What this machine can compile, build and run, why not, and the command that mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .backends import BACKENDS
from .gpu_probe import GpuInfo, probe_gpu
from .jetson import Jetson, read_jetson, read_memory
from .targets import RUNTIME_TITLES, TARGETS, Target, get_target

__all__ = ["Ability", "DoctorReport", "Machine", "TargetVerdict", "examine", "judge"]
__all__ += ["find_version", "read_machine", "read_memory", "read_providers"]

# Module -> the distributions that may bring it.
_DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "cuda": ("cuda-bindings", "cuda-python"),
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "onnxscript": ("onnxscript",),
    "safetensors": ("safetensors",),
    "sentencepiece": ("sentencepiece",),
}
_COMPILE_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")
_CPU_PROVIDER = "CPUExecutionProvider"
_EXPORT_CURE = 'pip install "mvlm-export[export]"'
_CUDA_CURE = 'pip install "cuda-python>=12.6,<13", or with CUDA 13 "cuda-python>=13"'
_RTX_CURE = 'pip install "mvlm-export[rtx]"'
_JETPACK_CURE = "install JetPack 6.1 or newer"
_JETPACK_TENSORRT_CURE = (
    "sudo apt install python3-libnvinfer, and make the virtual environment with "
    "python3 -m venv --system-site-packages"
)
_PROVIDER_CURES = {
    _CPU_PROVIDER: 'pip install "mvlm-export[cpu]"',
    "CUDAExecutionProvider": 'pip install "mvlm-export[gpu]"',
}


@dataclass(frozen=True)
class Ability:
    """Yes or no, why, and for a no the command or step that mends it ("" if nothing does)."""

    ok: bool
    reason: str
    cure: str = ""


@dataclass(frozen=True)
class TargetVerdict:
    """What this machine can do for one target.

    Attributes:
        series: of the target, whose members all have the same verdict; its name, where it
            stands alone.
    """

    target: str
    title: str
    series: str
    compile: Ability
    build: Ability
    run: Ability


@dataclass(frozen=True)
class Machine:
    """The facts that verdicts follow from.

    Attributes:
        python: "3.10.12".
        os: "Linux 5.15.148-tegra".
        architecture: "aarch64".
        jetson: None off Jetson.
        gpu: the CUDA driver's first device, or why there is none.
        memory_total: bytes; None where it cannot be read.
        memory_available: bytes that programs can still take; None likewise.
        disk_free: bytes in the working folder.
        packages: module to version; None if it is not installed.
        providers: of ONNX Runtime, as it reports them.
        provider_problem: why ONNX Runtime, though installed, does not load; else None.
    """

    python: str
    os: str
    architecture: str
    jetson: Jetson | None
    gpu: GpuInfo
    memory_total: int | None
    memory_available: int | None
    disk_free: int
    packages: Mapping[str, str | None]
    providers: tuple[str, ...]
    provider_problem: str | None = None

    def has(self, package: str) -> bool:
        return self.packages.get(package) is not None


@dataclass(frozen=True)
class DoctorReport:
    """The machine, and a verdict for each target."""

    machine: Machine
    targets: tuple[TargetVerdict, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``mvlm doctor --json``."""
        return asdict(self)


def examine(root: Path = Path("/"), folder: Path | None = None) -> DoctorReport:
    """Look at this machine; imports ONNX Runtime alone of the heavy packages.

    Args:
        root: where /proc and /etc are looked for; tests give a copy.
        folder: whose disk is measured; None is the working folder.
    """
    machine = read_machine(root, Path.cwd() if folder is None else folder)
    return DoctorReport(machine, judge(machine))


def read_machine(root: Path, folder: Path) -> Machine:
    """The facts of this machine."""
    packages = {module: find_version(module) for module in _DISTRIBUTIONS}
    providers, problem = read_providers() if packages["onnxruntime"] else ((), None)
    total, available = read_memory(root)
    return Machine(
        python=platform.python_version(),
        os=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        jetson=read_jetson(root),
        gpu=probe_gpu(),
        memory_total=total,
        memory_available=available,
        disk_free=shutil.disk_usage(folder).free,
        packages=packages,
        providers=providers,
        provider_problem=problem,
    )


def find_version(module: str) -> str | None:
    """Version of what is installed under a module's name, without importing it."""
    for name in _DISTRIBUTIONS[module]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def read_providers() -> tuple[tuple[str, ...], str | None]:
    """ONNX Runtime's own list of providers, or why it does not load."""
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        return (), str(error)
    return tuple(onnxruntime.get_available_providers()), None


def judge(machine: Machine) -> tuple[TargetVerdict, ...]:
    """A verdict for each target; a Jetson's JetPack decides which TensorRT is meant."""
    jetpack = machine.jetson.jetpack if machine.jetson else None
    verdicts = []
    for name, default in TARGETS.items():
        known = jetpack in (6, 7) and default.jetpack is not None
        target = get_target(name, jetpack) if known else default
        verdicts.append(
            TargetVerdict(
                name,
                target.title,
                target.series or name,
                compile=_judge_compile(machine),
                build=_judge_build(machine, target),
                run=_judge_run(machine, target),
            )
        )
    return tuple(verdicts)


def _judge_compile(machine: Machine) -> Ability:
    missing = [name for name in _COMPILE_PACKAGES if not machine.has(name)]
    if missing:
        return Ability(False, f"{', '.join(missing)} not installed", _EXPORT_CURE)
    runtime = _judge_provider(machine, _CPU_PROVIDER)
    if not runtime.ok:
        return Ability(
            True,
            "PyTorch and onnx are installed, but the parity step needs ONNX Runtime "
            f"({runtime.reason}): {runtime.cure}, or give --no-parity",
        )
    return Ability(True, "PyTorch and onnx are installed")


def _judge_build(machine: Machine, target: Target) -> Ability:
    if not target.has_engines:
        return Ability(True, "runs the ONNX files, nothing to build")
    if target.builds_on_host:
        if not machine.has("tensorrt_rtx"):
            return Ability(False, "tensorrt_rtx not installed", _RTX_CURE)
        return Ability(True, "builds on any host, without a GPU")
    return _judge_device(machine, target)


def _judge_device(machine: Machine, target: Target) -> Ability:
    """Is this the device that the target's engines must be built on and run on?"""
    jetson = machine.jetson
    if jetson is None:
        return Ability(
            False,
            "its engines are built on the device itself",
            "copy the bundle there and run: mvlm build BUNDLE",
        )
    if jetson.series is None or jetson.series != target.series:
        cure = f"choose --target {jetson.target}" if jetson.target else ""
        return Ability(False, f"this is a {jetson.model}", cure)
    if jetson.l4t is not None and jetson.jetpack != target.jetpack:
        return Ability(
            False, f"Jetson Linux {jetson.l4t} is not JetPack 6 or 7", _JETPACK_CURE
        )
    return _judge_tensorrt(machine, jetson, target)


def _judge_tensorrt(machine: Machine, jetson: Jetson, target: Target) -> Ability:
    """The TensorRT that is installed has the last word; a release only says what to expect."""
    installed, wanted = machine.packages.get("tensorrt"), target.tensorrt_version
    release = f"JetPack {jetson.jetpack}" if jetson.jetpack else "an unknown JetPack"
    if installed is None:
        if jetson.has_tensorrt_10 is False:
            return Ability(
                False, f"Jetson Linux {jetson.l4t} comes with TensorRT 8", _JETPACK_CURE
            )
        return Ability(False, "Python does not see TensorRT", _JETPACK_TENSORRT_CURE)
    if wanted is not None and _major_minor(installed) < wanted:
        needed = ".".join(map(str, wanted))
        return Ability(
            False, f"TensorRT {installed} of {release} is older than {needed}", _JETPACK_CURE
        )
    return Ability(True, f"TensorRT {installed} of {release}")


def _major_minor(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _judge_run(machine: Machine, target: Target) -> Ability:
    """Plans run on the GPU they are for; graphs wherever ONNX Runtime has its provider."""
    if not target.has_engines:
        return _judge_provider(machine, target.execution_provider or _CPU_PROVIDER)
    plans = _judge_plans(machine, target)
    if plans.ok:
        return plans
    graphs = _judge_provider(machine, _CPU_PROVIDER)
    if not graphs.ok:
        reason = f"no plans: {plans.reason}; no graphs: {graphs.reason}"
        return Ability(False, reason, graphs.cure)
    return Ability(
        True,
        f"its graphs run through {graphs.reason} on the CPU; no "
        f"{RUNTIME_TITLES[target.runtime]} plans: {plans.reason}",
    )


def _judge_plans(machine: Machine, target: Target) -> Ability:
    """Can plans be run here, once they are built?"""
    if target.runtime not in BACKENDS:
        title = RUNTIME_TITLES[target.runtime]
        return Ability(False, f"{title} plans are not executed yet")
    built = _judge_build(machine, target)
    if not built.ok:
        return built
    gpu = _judge_gpu(machine, built.reason)
    if gpu.ok and not machine.has("cuda"):
        return Ability(False, "cuda-python not installed", _CUDA_CURE)
    return gpu


def _judge_gpu(machine: Machine, reason: str) -> Ability:
    if not machine.gpu.present:
        return Ability(
            False,
            machine.gpu.problem or "no GPU",
            "run it on a machine with an NVIDIA GPU and its driver",
        )
    return Ability(True, f"{reason}, on {machine.gpu.name}")


def _judge_provider(machine: Machine, provider: str) -> Ability:
    cure = _PROVIDER_CURES[provider]
    if not machine.has("onnxruntime"):
        return Ability(False, "onnxruntime not installed", cure)
    if machine.provider_problem is not None:
        return Ability(False, f"onnxruntime does not load: {machine.provider_problem}", cure)
    if provider not in machine.providers:
        offered = ", ".join(machine.providers) or "none"
        return Ability(False, f"onnxruntime offers {offered}, not {provider}", cure)
    if provider == "CUDAExecutionProvider":
        return _judge_gpu(machine, f"onnxruntime offers {provider}")
    return Ability(True, f"onnxruntime {machine.packages['onnxruntime']}")
