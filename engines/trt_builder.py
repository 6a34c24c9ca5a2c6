"""ONNX file in, TensorRT plan out: one builder for ``tensorrt`` 10.3 to 11 and RTX.

Needs numpy and the TensorRT package alone, so that it runs on a Jetson as JetPack leaves it.
Networks are always strongly typed: the types in the ONNX file hold, and no precision flag is
ever set (they are gone from TensorRT 11).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .atomic_write import write_whole
from .build_options import BuildOptions
from .build_result import BuildResult
from .errors import EngineError
from .gpu_probe import probe_gpu
from .targets import RUNTIME_TITLES, Target
from .trt_api import (
    BuildLog,
    BuildProgress,
    LogRecord,
    ProgressCallback,
    ProgressTracker,
    TensorRT,
    TrtObject,
    load_tensorrt,
    read_memory,
    read_warnings,
    run_cancellable,
    tensorrt_log,
)
from .trt_diagnostics import (
    BuildFailedError,
    describe_build_failure,
    describe_parse_failure,
    read_errors,
    read_parser_issues,
)
from .trt_graph_cut import CutNode, cut_after, find_nodes
from .trt_profiles import (
    NetworkInput,
    ProfileSpec,
    ShapeRange,
    decoder_profiles,
    map_profile,
    vision_profiles,
)
from .trt_warnings import describe_refused

__all__ = [
    "BuildOptions",
    "BuildProgress",
    "BuildResult",
    "ProfileSpec",
    "build_engine",
    "decoder_profiles",
    "engine_capability",
    "vision_profiles",
]


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    profiles: Sequence[ProfileSpec],
    *,
    target: Target,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    compute_capability: tuple[int, int] | None = None,
    progress: ProgressCallback | None = None,
) -> BuildResult:
    """Build one plan in this process and put it at ``plan_path``, whole or not at all.

    ``build_process.build_engine`` does the same in a process of its own, which gives the
    memory back and makes the plan's bytes reproducible.

    Ctrl-C stops the build at TensorRT's next step; a second one does not wait for it.

    Args:
        onnx_path: the graph, its external data beside it.
        plan_path: the file to write; its folder is made, an older file replaced at the end.
        profiles: index order is the order given; empty for a graph of fixed shapes.
        target: asked for runtime, TensorRT and compute capability.
        options: workspace limit and optimization level; None leaves TensorRT's own.
        timing_cache: kernel timings, read before and written after; TensorRT-RTX has none.
        compute_capability: GPU to build for, where the package can build for others; None
            takes ``engine_capability(target)``.
        progress: called with ``BuildProgress`` from the building thread.

    Raises:
        EngineError: the file is missing, empty or not for this TensorRT, a profile does not
            fit, this GPU is not the target's, or TensorRT gives up or would change the graph;
            ``BuildFailedError`` where it parsed the graph and could not build it.
        MissingPackageError: the TensorRT package is not here.
        InputError: the target has no engines.
    """
    tracker = ProgressTracker(progress)
    job = open_job(
        onnx_path,
        profiles,
        target,
        tracker=tracker,
        options=options,
        timing_cache=timing_cache,
        compute_capability=compute_capability,
    )
    start = time.perf_counter()
    with job.log.collecting() as job.records:
        plan = run_cancellable(job.run, tracker.cancel)
    seconds = time.perf_counter() - start
    write_whole(plan_path, memoryview(plan))
    if job.new_timing_cache is not None and timing_cache is not None:
        write_whole(timing_cache, job.new_timing_cache)
    return job.result(plan_path, seconds)


def open_job(
    onnx_path: Path,
    profiles: Sequence[ProfileSpec],
    target: Target,
    *,
    tracker: ProgressTracker,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    compute_capability: tuple[int, int] | None = None,
) -> BuildJob:
    """A build that was checked and has not begun; for arguments and errors see above."""
    trt = load_tensorrt(target.runtime)
    _check_request(onnx_path, profiles)
    if not target.builds_on_host:
        _check_device(target)
    return BuildJob(
        trt,
        onnx_path,
        tuple(profiles),
        target,
        tracker,
        tensorrt_log(trt),
        options or BuildOptions(),
        capability=compute_capability or engine_capability(target),
        timing_cache=timing_cache if target.times_kernels else None,
    )


def _check_request(onnx_path: Path, profiles: Sequence[ProfileSpec]) -> None:
    if not onnx_path.is_file():
        raise EngineError(f"There is no ONNX file {onnx_path}. Compile the model first.")
    if onnx_path.stat().st_size == 0:
        # TensorRT reads an empty file as a network without layers, and calls that success.
        raise EngineError(f"{onnx_path} is empty, so a copy broke off. Compile or copy again.")
    names = [profile.name for profile in profiles]
    if len(set(names)) != len(names):
        raise EngineError(f"Profile names must differ, not {', '.join(names)}. Rename one.")


def _check_device(target: Target) -> None:
    """An engine of another GPU's would load nowhere: refuse before an hour of building."""
    gpu = probe_gpu()
    if gpu.compute_capability not in (None, target.compute_capability):
        raise EngineError(
            f"This machine's GPU ({gpu.name}) has compute capability "
            f"{_dotted(gpu.compute_capability)}, {target.title} has "
            f"{_dotted(target.compute_capability)}: an engine built here would not load "
            "there. Copy the bundle to the device and run `mvlm build BUNDLE` on it."
        )


def engine_capability(target: Target) -> tuple[int, int] | None:
    """The GPU that an engine built here is for. Name the plan's folder by it.

    A target that follows the GPU takes the one found, if its package knows it; all others have
    their own figure.
    """
    if not target.follows_gpu:
        return target.compute_capability
    found = probe_gpu().compute_capability
    known = getattr(load_tensorrt(target.runtime), "ComputeCapability", None)
    if found is not None and hasattr(known, "SM{}{}".format(*found)):
        return found
    return target.compute_capability


def _dotted(numbers: tuple[int, ...] | None) -> str:
    return "none" if numbers is None else ".".join(map(str, numbers))


@dataclass
class BuildJob:
    """One build. Holds builder, network and parser: TensorRT crashes if one goes too early."""

    trt: TensorRT
    onnx_path: Path
    profiles: tuple[ProfileSpec, ...]
    target: Target
    tracker: ProgressTracker
    log: BuildLog
    options: BuildOptions
    capability: tuple[int, int] | None
    timing_cache: Path | None
    records: list[LogRecord] = field(default_factory=list)
    shapes: dict[str, dict[str, ShapeRange]] = field(default_factory=dict)
    new_timing_cache: memoryview | None = None
    alive: list[TrtObject] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def run(self) -> TrtObject:
        """Parse and build; the plan as a buffer."""
        builder = self._create_builder()
        plan = self._build(builder, self._parse(builder))
        refused = describe_refused(read_warnings(self.records))
        if refused is not None:
            raise EngineError(f"{self.label} cannot keep to {self.onnx_path}. {refused}")
        return plan

    def list_nodes(self) -> list[CutNode]:
        """Parse; the ONNX nodes behind which the graph can be cut, in order."""
        return find_nodes(self._parse(self._create_builder()))

    def build_part(self, node: str) -> None:
        """Parse, cut behind a node ("" for nowhere), and build what is left; drop the plan.

        Raises:
            BuildFailedError: that part cannot be built either.
        """
        builder = self._create_builder()
        network = self._parse(builder)
        if node:
            cut_after(network, node)
        self._build(builder, network)

    def _build(self, builder: TrtObject, network: TrtObject) -> TrtObject:
        config = self._configure(builder)
        self._add_profiles(builder, network, config)
        plan = builder.build_serialized_network(network, config)
        if self.tracker.failure is not None:
            raise self.tracker.failure
        if plan is None:
            raise BuildFailedError(
                describe_build_failure(self.onnx_path, self.label, self.records),
                read_errors(self.records),
            )
        self._keep_timing_cache(config)
        return plan

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def label(self) -> str:
        return f"{RUNTIME_TITLES[self.target.runtime]} {self.version}"

    def _create_builder(self) -> TrtObject:
        try:
            builder = self.trt.Builder(self.log.logger)
        except (RuntimeError, TypeError) as error:  # pybind's words for a null builder
            raise EngineError(
                f"{self.label} does not start here ({error}); most often no GPU "
                "can be used. Run `mvlm doctor`."
            ) from error
        self.alive.append(builder)
        return builder

    def _parse(self, builder: TrtObject) -> TrtObject:
        # STRONGLY_TYPED is 1 in TensorRT 10 and 0 in 11 and RTX: always by its name.
        flag = self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        if network is None:
            raise EngineError(describe_build_failure(self.onnx_path, self.label, self.records))
        parser = self.trt.OnnxParser(network, self.log.logger)
        self.alive += [network, parser]
        # From a file, so that external data beside it is found and mapped.
        if not parser.parse_from_file(str(self.onnx_path)):
            issues = read_parser_issues(parser, self.records)
            raise EngineError(describe_parse_failure(self.onnx_path, self.label, issues))
        if network.num_layers == 0:
            raise EngineError(
                f"{self.onnx_path} holds a graph without a single node. Compile it again."
            )
        return network

    def _configure(self, builder: TrtObject) -> TrtObject:
        trt, config = self.trt, builder.create_builder_config()
        self.alive += [config, self.tracker.attach(trt, config)]
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        limit, level = self.options.workspace_bytes, self.options.optimization_level
        if limit is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
        if level is not None:
            config.builder_optimization_level = level
        if hasattr(config, "num_compute_capabilities") and self.capability is not None:
            name = "SM{}{}".format(*self.capability)
            if not hasattr(trt.ComputeCapability, name):
                raise EngineError(
                    f"{self.label} cannot build for {name}. Build for "
                    "that GPU on the device itself."
                )
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
        self._load_timing_cache(config)
        self._note_version()
        return config

    def _note_version(self) -> None:
        expected = self.target.tensorrt_version
        if expected is not None and self.version.split(".")[:2] != [str(n) for n in expected]:
            self.notes.append(
                f"graphs made for TensorRT {_dotted(expected)}, built by {self.version}"
            )

    def _add_profiles(self, builder: TrtObject, network: TrtObject, config: TrtObject) -> None:
        inputs = [_read_input(network.get_input(i)) for i in range(network.num_inputs)]
        dynamic = [entry.name for entry in inputs if entry.is_dynamic]
        if dynamic and not self.profiles:
            raise EngineError(
                f"{self.onnx_path.name} has dynamic inputs ({', '.join(dynamic)}) but no "
                "profile was given. Pass decoder_profiles(...) or vision_profiles(...)."
            )
        for spec in self.profiles:
            shapes = self.shapes[spec.name] = map_profile(inputs, spec)
            profile = builder.create_optimization_profile()
            self.alive.append(profile)
            try:
                for name, (low, opt, high) in shapes.items():
                    profile.set_shape(name, low, opt, high)
                index = config.add_optimization_profile(profile)
            except (RuntimeError, ValueError) as error:
                raise EngineError(
                    f"{self.label} refuses profile {spec.name!r}: {error}. Check "
                    f"its ranges: {dict(spec.dims)}."
                ) from error
            if index < 0:
                raise EngineError(
                    f"{self.label} refuses profile {spec.name!r} with ranges "
                    f"{dict(spec.dims)}: "
                    + describe_build_failure(self.onnx_path, self.label, self.records)
                )

    def _load_timing_cache(self, config: TrtObject) -> None:
        if self.timing_cache is None:
            return
        stored = self.timing_cache.read_bytes() if self.timing_cache.is_file() else b""
        cache = config.create_timing_cache(stored)
        if cache is None or not config.set_timing_cache(cache, False):
            self.notes.append(
                f"the timing cache {self.timing_cache} is of another device or TensorRT; "
                "timings start anew"
            )
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        self.alive.append(cache)

    def _keep_timing_cache(self, config: TrtObject) -> None:
        if self.timing_cache is not None:
            cache = config.get_timing_cache()
            self.new_timing_cache = None if cache is None else memoryview(cache.serialize())

    def result(self, plan_path: Path, seconds: float) -> BuildResult:
        """The figures of a finished build."""
        memory = read_memory(self.records)
        names = tuple(profile.name for profile in self.profiles)
        keys = names or ("default",)
        same = len(keys) == len(memory.activations)
        return BuildResult(
            plan_path=plan_path,
            plan_bytes=plan_path.stat().st_size,
            seconds=seconds,
            weights_memory=memory.weights,
            activation_memory=dict(zip(keys, memory.activations, strict=True)) if same else {},
            tensorrt_version=self.version,
            kind=self.target.runtime,
            compute_capability=self.capability,
            profiles=names,
            shapes=self.shapes,
            options=self.options,
            warnings=(*self.notes, *read_warnings(self.records)),
        )


def _read_input(tensor: TrtObject) -> NetworkInput:
    shape = tuple(int(size) for size in tensor.shape)
    names = tuple(tensor.get_dimension_name(axis) or None for axis in range(len(shape)))
    return NetworkInput(str(tensor.name), shape, names)
