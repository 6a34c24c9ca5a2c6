"""Engines of a bundle: three plans built by the TensorRT of this machine.

Runs on a device with numpy and the system's ``tensorrt`` alone, or on any host with
``tensorrt_rtx``. Each plan is built in a process of its own. The plans land in
``engines/<target>-trt<version>-sm<cc>/`` of the bundle, whole or not at all, with a
``build.json`` that holds their hashes and keys; the manifest stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from .build_options import BuildOptions
from .build_process import build_engine
from .build_result import BuildResult, read_range
from .build_worker import Request
from .bundle import BUILD_FILE, ENGINES, Bundle, replace_folder, sha256_of, write_json
from .errors import EngineError
from .jetson import read_jetson
from .kv_cache import KvForm
from .manifest import ModelSpec
from .plan_key import (
    BuilderIdentity,
    PlanKey,
    PlanState,
    graph_sources,
    plan_keys,
    read_plan_states,
    require_plans,
)
from .plan_profiles import bundle_profiles, graph_profiles
from .targets import TARGETS, Target, get_target
from .trt_api import BuildProgress
from .trt_bisect import find_culprit
from .trt_diagnostics import BuildFailedError
from .trt_profiles import ProfileSpec, WeightKind
from .trtexec import trtexec_line

__all__ = [
    "BuildOptions",
    "build_engines",
    "build_stand_in",
    "examine_plans",
    "graph_profiles",
    "open_plans",
    "plan_trtexec",
]

TIMING_CACHE = "timing.cache"
STAND_IN = "rtx"
"""The target whose builder checks graphs of devices that are not here."""
STAND_IN_CAPABILITY = (8, 6)
"""Orin's nearest kin among the compute capabilities that TensorRT-RTX knows."""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being built)."""

_STEPS = 1000


@dataclass(frozen=True)
class _Batch:
    """Plans that are built one after another into one folder."""

    target: Target
    folder: Path
    profiles: Mapping[str, tuple[ProfileSpec, ...]]
    options: BuildOptions
    capability: tuple[int, int] | None
    progress: Progress | None
    results: dict[str, BuildResult] = field(default_factory=dict)

    def build(self, graphs: Mapping[str, Path]) -> dict[str, BuildResult]:
        """Build each graph; a failure is looked into until its node is found."""
        for index, (name, path) in enumerate(graphs.items()):
            try:
                self.results[name] = self._build(name, path, index, len(graphs))
            except BuildFailedError as error:
                self._explain(name, path, error)
                raise
        return self.results

    def _build(self, name: str, path: Path, index: int, count: int) -> BuildResult:
        label = f"{name}.plan"

        def report(state: BuildProgress) -> None:
            self._tell(int((index + state.fraction) * _STEPS), count * _STEPS, label)

        result = build_engine(
            path,
            self.folder / label,
            self.profiles[name],
            target=self.target,
            options=self.options,
            timing_cache=self.folder / TIMING_CACHE,
            compute_capability=self.capability,
            progress=report,
        )
        self._tell((index + 1) * _STEPS, count * _STEPS, label)
        return result

    def _tell(self, done: int, total: int, label: str) -> None:
        if self.progress is not None:
            self.progress(done, total, label)

    def _explain(self, name: str, path: Path, failure: BuildFailedError) -> None:
        """Raise the failure again with the node it lies at; return if none can be named."""
        request = Request(
            "build",
            path.absolute(),
            self.folder.absolute() / f"{name}.plan",
            self.profiles[name],
            self.target,
            self.options,
            None,
            self.capability,
        )
        try:
            culprit = find_culprit(request, failure, self._tell)
        except KeyboardInterrupt:
            raise BuildFailedError(
                f"{failure}\nThe search for the node was interrupted.", failure.errors
            ) from failure
        if culprit is not None:
            raise BuildFailedError(f"{failure}\n{culprit}", failure.errors) from failure


def _engine_target(bundle: Bundle) -> Target:
    target = get_target(bundle.manifest.target, bundle.manifest.jetpack)
    if not target.has_engines:
        raise EngineError(
            f"The bundle is for target {target.name!r}, which runs the ONNX files as they "
            "are: there is nothing to build. Answer with `mvlm run`."
        )
    return target


def _keys(
    bundle: Bundle,
    target: Target,
    options: BuildOptions | None,
    builder: BuilderIdentity | None = None,
) -> dict[str, PlanKey]:
    options = (options or BuildOptions()).for_target(target, read_jetson())
    builder = builder or BuilderIdentity.of(target)
    return plan_keys(bundle.manifest, builder, bundle_profiles(bundle.manifest), options)


def examine_plans(
    bundle: Bundle,
    options: BuildOptions | None = None,
    builder: BuilderIdentity | None = None,
) -> dict[str, PlanState]:
    """Which plans of a bundle hold for this machine and these options, and why not.

    Args:
        options: as for ``build_engines``.
        builder: whose plans are asked for; None for this machine's TensorRT and GPU.

    Raises:
        EngineError: the bundle's target has no engines.
        MissingPackageError: TensorRT is not installed.
        BundleError: a build record cannot be read.
    """
    target = _engine_target(bundle)
    return read_plan_states(bundle, target, _keys(bundle, target, options, builder))


def open_plans(bundle: Bundle, builder: BuilderIdentity | None = None) -> dict[str, Path]:
    """Plans by graph that this machine's TensorRT and GPU can load; for what runs them.

    Options that change a plan's making alone (workspace, level) do not matter here.

    Args:
        builder: what loads them; None for this machine's TensorRT and GPU.

    Raises:
        EngineError: a plan is missing, stale, damaged or of another machine; says why.
        MissingPackageError: TensorRT is not installed.
    """
    target = _engine_target(bundle)
    keys = _keys(bundle, target, None, builder)
    require_plans(bundle, read_plan_states(bundle, target, keys, runs_only=True))
    key = next(iter(keys.values()))
    folder = target.plan_folder(key.builder.version, key.builder.compute_capability)
    plans = bundle.engines()[folder]["plans"]
    return {name: bundle.path / ENGINES / folder / plans[name]["plan_path"] for name in keys}


def build_engines(
    bundle: Bundle,
    progress: Progress | None = None,
    options: BuildOptions | None = None,
    keep: Collection[str] = (),
) -> dict[str, Any]:
    """Build the plans of a bundle on this machine and put them into it.

    Plans of the same TensorRT and GPU are replaced, and their timing cache is used again;
    others stay.

    Args:
        options: workspace limit and optimization level; a limit that is not given is
            ``default_workspace`` of the target.
        keep: graphs whose plans stay as they are, which ``examine_plans`` found fresh.

    Returns:
        The build record: ``folder``, ``target``, ``tensorrt_version`` and ``plans`` by graph.

    Raises:
        EngineError: the bundle's target has no engines, this machine cannot build them, or
            TensorRT gives up; names the node if it can be found.
        MissingPackageError: TensorRT is not installed.
    """
    target = _engine_target(bundle)
    keys = _keys(bundle, target, options)
    key = next(iter(keys.values()))
    name = target.plan_folder(key.builder.version, key.builder.compute_capability)
    if set(keep) >= set(keys):
        return bundle.engines()[name]
    engines = bundle.path / ENGINES
    engines.mkdir(exist_ok=True)
    place = engines / name
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=engines))
    try:
        partial.chmod(0o755)
        if (place / TIMING_CACHE).is_file():
            shutil.copyfile(place / TIMING_CACHE, partial / TIMING_CACHE)
        kept = _keep_plans(bundle, name, partial, keep)
        batch = _Batch(
            target,
            partial,
            {graph: key.profiles for graph, key in keys.items()},
            key.options,
            key.builder.compute_capability,
            progress,
        )
        built = batch.build({g: bundle.graph_path(g) for g in keys if g not in kept})
        records = {graph: _plan_record(bundle, keys[graph], name, graph, result)
                   for graph, result in built.items()}  # fmt: skip
        record = {
            "folder": name,
            "target": target.name,
            "tensorrt_version": key.builder.version,
            "plans": {graph: kept.get(graph) or records[graph] for graph in keys},
        }
        write_json(partial / BUILD_FILE, record)
        replace_folder(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not any(engines.iterdir()):
            engines.rmdir()
    return record


def _keep_plans(
    bundle: Bundle, folder: str, partial: Path, keep: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Put plans that stay into the new folder too; their records."""
    plans = bundle.engines()[folder]["plans"] if keep else {}
    kept = {name: plan for name, plan in plans.items() if name in keep}
    for plan in kept.values():
        source = bundle.path / ENGINES / folder / plan["plan_path"]
        try:
            os.link(source, partial / source.name)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, partial / source.name)
    return kept


def _plan_record(
    bundle: Bundle, key: PlanKey, folder: str, name: str, result: BuildResult
) -> dict[str, Any]:
    record = {
        **result.to_json(),
        "sha256": sha256_of(result.plan_path),
        "key": key.to_json(),
        "profiles": [profile.to_json() for profile in key.profiles],
        "sources": graph_sources(bundle.manifest, name),
    }
    graph = PurePath(bundle.manifest.graphs[name].file)
    record["trtexec"] = _trtexec(record, PurePath(), folder, graph)
    return record


def _trtexec(plan: Mapping[str, Any], root: PurePath, folder: str, graph: PurePath) -> str:
    place = root / ENGINES / folder
    shapes = {
        profile: {name: read_range(entry) for name, entry in inputs.items()}
        for profile, inputs in plan["shapes"].items()
    }
    options = BuildOptions.from_json(plan["options"])
    times = any(t.times_kernels for t in TARGETS.values() if t.runtime == plan["kind"])
    cache = place / TIMING_CACHE if times else None
    return trtexec_line(root / graph, place / plan["plan_path"], shapes, options, cache)


def plan_trtexec(bundle: Bundle, record: Mapping[str, Any], name: str) -> str:
    """The ``trtexec`` line that builds a plan of a record over again, where the bundle lies.

    ``record["plans"][name]["trtexec"]`` is the same with paths from the bundle's folder on.
    """
    graph = PurePath(bundle.manifest.graphs[name].file)
    return _trtexec(record["plans"][name], bundle.path, record["folder"], graph)


def build_stand_in(
    graphs: Mapping[str, Path],
    model: ModelSpec,
    kind: WeightKind,
    folder: Path,
    progress: Progress | None = None,
    kv_form: KvForm = "append",
) -> dict[str, Any]:
    """Parse and build graphs with TensorRT-RTX to see that they build; the plans are dropped.

    TensorRT-RTX has no compute capability 8.7, so this proves types, shapes and profiles, not
    the device's own build.

    Args:
        kind: how the decoder's weights are stored.
        folder: an existing folder with room for the plans, in a temporary folder of its own.
        kv_form: of the decoder's cache.

    Raises:
        EngineError: TensorRT-RTX refuses a graph.
        MissingPackageError: it is not installed.
    """
    profiles = graph_profiles(model, kind, kv_form)
    with tempfile.TemporaryDirectory(prefix=".stand-in.", dir=folder) as place:
        batch = _Batch(
            TARGETS[STAND_IN],
            Path(place),
            profiles,
            BuildOptions(),
            STAND_IN_CAPABILITY,
            progress,
        )
        return {name: result.to_json() for name, result in batch.build(graphs).items()}
