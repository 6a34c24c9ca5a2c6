"""What the compiler can compile for: one frozen record per target, asked for capabilities.

No code compares a target by name; it asks ``target.op_set``, ``target.builds_on_host`` and so
on. JetPack decides the TensorRT of a Jetson, so a Jetson record is made from a module (memory,
bandwidth, GPU; ``jetson_modules.py``) and a JetPack (TensorRT, opset, operators). TensorRT-RTX
has a record for each compute capability that it builds for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .errors import InputError
from .jetson_modules import ALIASES, JETSON_MODULES, JetsonModule
from .kv_cache import KvForm

RuntimeKind = Literal["tensorrt", "tensorrt_rtx", "onnxruntime"]
RUNTIME_TITLES: Mapping[str, str] = {
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "onnxruntime": "ONNX Runtime",
}

ORT_DOMAIN = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

OPS_PER_CLOCK = 2048
"""Dense FP16 operations of one Orin streaming multiprocessor in a clock; see
``jetson_modules.py`` for how this meets the data sheets."""

# ONNX's own names of element types (onnx.TensorProto.DataType).
_TENSORRT_DTYPES = frozenset(
    {"FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "INT4", "UINT8", "BOOL"}
)
# ONNX Runtime's CPU and CUDA kernels; FLOAT8 and BFLOAT16 have too few of them to rely on.
_ONNXRUNTIME_DTYPES = frozenset(
    {
        "FLOAT",
        "FLOAT16",
        "DOUBLE",
        "INT64",
        "INT32",
        "INT16",
        "INT8",
        "INT4",
        "UINT64",
        "UINT32",
        "UINT16",
        "UINT8",
        "UINT4",
        "BOOL",
        "STRING",
    }
)


@dataclass(frozen=True)
class Target:
    """What one kind of device can be given.

    Attributes:
        name: what ``--target`` is called with.
        title: the device and its software, for people.
        runtime: which library runs the bundle's graphs there.
        compute_capability: of the GPU that engines are made for, (8, 7) for Orin; None for a
            target without engines.
        memory_gb: memory of the module as sold, in units of 2**30 bytes, shared by CPU and GPU
            on Jetson; None if it varies.
        bandwidth_gb_s: memory bandwidth in GB/s, decimal; None if it varies.
        tensorrt_version: (major, minor) that reads the graphs; None without TensorRT.
        opset_ceiling: highest ONNX opset that may reach it.
        ir_ceiling: highest ONNX IR version that may reach it.
        op_set: name of the operator allow-list in ``passes.tensorrt_ops``; None allows all
            standard operators.
        dtypes: element types that may stand in a graph, by ONNX's names.
        io_only_dtypes: those of them that may stand at graph inputs and outputs alone.
        extra_domains: operator domains allowed beside the standard one.
        symmetric_quantization: True if every Q/DQ zero point must be zero or absent.
        kv_form: form of the decoder's cache; "append" is past in, new rows out, "fixed" the
            whole cache in and, rewritten in place, out.
        default_recipe: recipe chosen when the user names none.
        builds_on_host: False if engines can be built on the device alone.
        execution_provider: ONNX Runtime's provider; None for TensorRT.
        jetpack: JetPack major version; None off Jetson.
        series: targets whose bundles hold the same graphs, so that each of these devices can
            build and run them; None where there is one alone.
        follows_gpu: whether engines are made for the GPU that is found, where one is, and
            ``compute_capability`` is what they are made for elsewhere; False where it binds.
        gpu_sms: streaming multiprocessors of its GPU; None if it varies.
        gpu_ghz: the highest clock of its GPU; None if it varies.
        own_passes: names of optional graph passes that run for it without being asked for.
        logits_rows: most rows of logits that its decoder gives, the last ones; with more than
            one a drafted continuation is verified in one call.
        kv_cache_dtypes: what its decoder's cache may be stored as, beside the graph's floats.
    """

    name: str
    title: str
    runtime: RuntimeKind
    compute_capability: tuple[int, int] | None
    memory_gb: float | None
    bandwidth_gb_s: float | None
    tensorrt_version: tuple[int, int] | None
    opset_ceiling: int
    ir_ceiling: int
    op_set: str | None
    dtypes: frozenset[str]
    io_only_dtypes: frozenset[str]
    extra_domains: frozenset[str]
    symmetric_quantization: bool
    kv_form: KvForm
    default_recipe: Literal["fp16", "fp32"]
    builds_on_host: bool
    execution_provider: str | None = None
    jetpack: int | None = None
    series: str | None = None
    follows_gpu: bool = False
    gpu_sms: int | None = None
    gpu_ghz: float | None = None
    own_passes: frozenset[str] = frozenset()
    logits_rows: int = 1
    kv_cache_dtypes: frozenset[str] = frozenset()

    @property
    def memory_bytes(self) -> int | None:
        """Memory of the module, before anything takes of it; None if it varies."""
        return None if self.memory_gb is None else int(self.memory_gb * 2**30)

    @property
    def fp16_tflops(self) -> float | None:
        """Dense FP16 peak of the tensor cores in 10**12 a second, two for a product and sum.

        ``OPS_PER_CLOCK`` a streaming multiprocessor; None if the GPU varies.
        """
        if self.gpu_sms is None or self.gpu_ghz is None:
            return None
        return self.gpu_sms * self.gpu_ghz * OPS_PER_CLOCK / 1e3

    @property
    def int8_tops(self) -> float | None:
        """Dense 8-bit peak, twice that of FP16; None if the GPU varies."""
        return None if self.fp16_tflops is None else 2 * self.fp16_tflops

    @property
    def provider(self) -> Literal["cpu", "cuda"]:
        """What ONNX Runtime runs the bundle's graphs on."""
        return "cuda" if self.execution_provider == "CUDAExecutionProvider" else "cpu"

    @property
    def has_engines(self) -> bool:
        """True if graphs become TensorRT plans for this target."""
        return self.runtime != "onnxruntime"

    @property
    def scatters_cache(self) -> bool:
        """True if ONNX's TensorScatter (opset 24) writes the decoder's fixed cache.

        Where ONNX Runtime's own operators run, GroupQueryAttention does.
        """
        return self.kv_form == "fixed" and ORT_DOMAIN not in self.extra_domains

    @property
    def times_kernels(self) -> bool:
        """True if a build times kernels on the GPU, so that a timing cache shortens the next.

        TensorRT-RTX chooses its kernels when an engine is loaded.
        """
        return self.runtime == "tensorrt"

    def plan_folder(
        self, tensorrt_version: str, compute_capability: tuple[int, int] | None = None
    ) -> str:
        """Folder of its plans in a bundle, ``orin-trt10.3.0-sm87``.

        Args:
            tensorrt_version: of the package that builds.
            compute_capability: of the GPU built for; None is the target's.

        Raises:
            InputError: the target has no engines.
        """
        capability = compute_capability or self.compute_capability
        if capability is None:
            raise InputError(
                f"Target {self.name!r} runs ONNX files and has no engines, so no plan folder."
            )
        major, minor = capability
        return f"{self.name}-trt{tensorrt_version}-sm{major}{minor}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for manifests and ``--json``; sets become sorted lists."""
        values = asdict(self)
        for key, value in values.items():
            if isinstance(value, frozenset):
                values[key] = sorted(value)
            elif isinstance(value, tuple):
                values[key] = list(value)
        return values


@dataclass(frozen=True)
class _JetPack:
    """What a JetPack release brings: its TensorRT and what that reads."""

    tensorrt_version: tuple[int, int]
    opset_ceiling: int
    ir_ceiling: int
    op_set: str
    kv_form: KvForm


_JETPACKS = {
    # JetPack 6.1/6.2: L4T R36.4, CUDA 12.6, TensorRT 10.3. onnx-tensorrt documents opset 9-20;
    # its parser reads INT4, which ONNX has from opset 21 only. IR 10 is ONNX 1.16's, the ONNX
    # that parser is built with.
    6: _JetPack(
        (10, 3), opset_ceiling=21, ir_ceiling=10, op_set="tensorrt_10_3", kv_form="append"
    ),
    # JetPack 7.2: L4T R39.2, CUDA 13.2, TensorRT 10.16. onnx-tensorrt's operators.md of 10.15:
    # opset 9-24; its changelog's last ONNX is 1.18 (10.11), whose IR is 11. It has
    # TensorScatter, which writes into the cache in place.
    7: _JetPack(
        (10, 16), opset_ceiling=24, ir_ceiling=11, op_set="tensorrt_10_16", kv_form="fixed"
    ),
}
_DEFAULT_JETPACK = 6


def _jetson(module: JetsonModule) -> Target:
    """A Jetson Orin module under the default JetPack.

    Compute capability 8.7 (Ampere): FP16, BF16, INT8 and weight-only INT4, no FP8. TensorRT
    engines only run on the kind of device that built them.
    """
    jetpack = _JETPACKS[_DEFAULT_JETPACK]
    target = Target(
        name=module.name,
        title=module.title,
        runtime="tensorrt",
        compute_capability=(8, 7),
        memory_gb=module.memory_gb,
        bandwidth_gb_s=module.bandwidth_gb_s,
        tensorrt_version=jetpack.tensorrt_version,
        opset_ceiling=jetpack.opset_ceiling,
        ir_ceiling=jetpack.ir_ceiling,
        op_set=jetpack.op_set,
        dtypes=_TENSORRT_DTYPES,
        # onnx-tensorrt operators.md: "UINT8 is only supported as network input or output".
        io_only_dtypes=frozenset({"UINT8"}),
        extra_domains=frozenset(),
        symmetric_quantization=True,
        kv_form=jetpack.kv_form,
        default_recipe="fp16",
        builds_on_host=False,
        series=module.series,
        gpu_sms=module.gpu_sms,
        gpu_ghz=module.gpu_ghz,
    )
    return _with_jetpack(target, module.title, _DEFAULT_JETPACK)


def _with_jetpack(target: Target, module: str, version: int) -> Target:
    jetpack = _JETPACKS[version]
    major, minor = jetpack.tensorrt_version
    return replace(
        target,
        title=f"{module}, JetPack {version} (TensorRT {major}.{minor})",
        tensorrt_version=jetpack.tensorrt_version,
        opset_ceiling=jetpack.opset_ceiling,
        ir_ceiling=jetpack.ir_ceiling,
        op_set=jetpack.op_set,
        kv_form=jetpack.kv_form,
        jetpack=version,
    )


def _onnxruntime(
    name: str, title: str, recipe: Literal["fp16", "fp32"], ep: str, kv_form: KvForm
) -> Target:
    """ONNX Runtime 1.20 or newer: opset 21 and IR 10 are what all of those read."""
    return Target(
        name=name,
        title=title,
        runtime="onnxruntime",
        compute_capability=None,
        memory_gb=None,
        bandwidth_gb_s=None,
        tensorrt_version=None,
        opset_ceiling=21,
        ir_ceiling=10,
        op_set=None,
        dtypes=_ONNXRUNTIME_DTYPES,
        io_only_dtypes=frozenset(),
        extra_domains=frozenset({ORT_DOMAIN}),
        symmetric_quantization=False,
        kv_form=kv_form,
        default_recipe=recipe,
        builds_on_host=True,
        execution_provider=ep,
    )


# TensorRT-RTX 1.7 (the parser and API of TensorRT 11) builds on any host, without a GPU, for
# SM75 SM80 SM86 SM89 SM120 SM121. It has no SM87; SM86 is Orin's nearest kin.
_RTX = Target(
    name="rtx",
    title="GeForce RTX and kin (TensorRT-RTX 1.7)",
    runtime="tensorrt_rtx",
    compute_capability=(8, 6),
    memory_gb=None,
    bandwidth_gb_s=None,
    tensorrt_version=(1, 7),
    opset_ceiling=24,
    ir_ceiling=12,
    op_set="tensorrt_rtx_1_7",
    dtypes=_TENSORRT_DTYPES,
    io_only_dtypes=frozenset({"UINT8"}),
    extra_domains=frozenset(),
    symmetric_quantization=True,
    kv_form="append",
    default_recipe="fp16",
    builds_on_host=True,
    series="rtx",
    follows_gpu=True,
)

RTX_GPUS: dict[tuple[int, int], str] = {
    (7, 5): "Turing, GeForce RTX 20",
    (8, 0): "Ampere, A100",
    (8, 6): "Ampere, GeForce RTX 30",
    (8, 9): "Ada, GeForce RTX 40",
    (12, 0): "Blackwell, GeForce RTX 50",
    (12, 1): "Blackwell, GB10",
}
"""Compute capabilities that TensorRT-RTX 1.7 builds for (its enum ``ComputeCapability``)."""


def _rtx(capability: tuple[int, int]) -> Target:
    """TensorRT-RTX for one compute capability; bfloat16 came with Ampere (8.0)."""
    major, minor = capability
    missing = {"BFLOAT16"} if capability < (8, 0) else set()
    return replace(
        _RTX,
        name=f"rtx-sm{major}{minor}",
        title=f"{RTX_GPUS[capability]}, compute capability {major}.{minor} (TensorRT-RTX 1.7)",
        compute_capability=capability,
        dtypes=_TENSORRT_DTYPES - missing,
        follows_gpu=False,
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        *map(_jetson, JETSON_MODULES),
        _RTX,
        *map(_rtx, RTX_GPUS),
        # GroupQueryAttention on a fixed cache: 0.79 to 0.93 of the append form's time on the
        # CPU (docs/passes.md); on CUDA it has not been run.
        replace(
            _onnxruntime(
                "cpu", "ONNX Runtime on the CPU", "fp32", "CPUExecutionProvider", "fixed"
            ),
            own_passes=frozenset(
                {"choose-greedy-token", "use-integer-matmul", "use-skip-rms-norm"}
            ),
            logits_rows=8,
            kv_cache_dtypes=frozenset({"int8"}),
        ),
        _onnxruntime(
            "cuda", "ONNX Runtime on CUDA", "fp16", "CUDAExecutionProvider", "append"
        ),
    )
}


def get_target(name: str, jetpack: int | None = None) -> Target:
    """The record of a target, for a Jetson under the JetPack asked for.

    Args:
        name: one of ``TARGETS`` or ``ALIASES``.
        jetpack: 6 or 7, for Jetson targets alone; None means 6.

    Raises:
        InputError: no such target or JetPack, or a JetPack for what is no Jetson.
    """
    target = TARGETS.get(ALIASES.get(name, name))
    if target is None:
        close = difflib.get_close_matches(name.lower(), TARGETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise InputError(f"There is no target {name!r}.{hint} Known: {', '.join(TARGETS)}.")
    if jetpack is None:
        return target
    if target.jetpack is None:
        jetsons = ", ".join(t.name for t in TARGETS.values() if t.jetpack is not None)
        raise InputError(
            f"A JetPack was given for target {name!r}, which is no Jetson. Leave it out, or "
            f"choose one of: {jetsons}."
        )
    if jetpack not in _JETPACKS:
        known = " or ".join(str(version) for version in _JETPACKS)
        raise InputError(
            f"JetPack {jetpack} is not known here: choose {known}. JetPack 5 and older have "
            "TensorRT 8, which knows neither INT4 nor strongly typed networks as used here."
        )
    return _with_jetpack(target, target.title.split(", JetPack")[0], jetpack)
