"""Engines of a bundle: three plans built by the TensorRT of this machine.

Runs on a device with numpy and the system's ``tensorrt`` alone, or on any host with
``tensorrt_rtx``. The plans land in ``engines/<target>-trt<version>-sm<cc>/`` of the bundle,
whole or not at all, with a ``build.json`` that holds their hashes; the manifest stays.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .bundle import BUILD_FILE, ENGINES, Bundle, replace_folder, sha256_of, write_json
from .errors import EngineError
from .kv_cache import KvForm
from .manifest import ModelSpec
from .targets import TARGETS, Target, get_target
from .trt_api import load_tensorrt
from .trt_builder import BuildProgress, BuildResult, build_engine, engine_capability
from .trt_profiles import ProfileSpec, WeightKind, decoder_profiles, vision_profiles

TIMING_CACHE = "timing.cache"
STAND_IN = "rtx"
"""The target whose builder checks graphs of devices that are not here."""
STAND_IN_CAPABILITY = (8, 6)
"""Orin's nearest kin among the compute capabilities that TensorRT-RTX knows."""

MAX_IMAGES = 4
"""Images that one call of the vision encoder and one prompt may hold."""

_WEIGHT_KINDS: Mapping[str, WeightKind] = {"float32": "fp32", "float16": "fp16"}

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being built)."""

_STEPS = 1000


def graph_profiles(
    model: ModelSpec, dtype: str, kv_form: KvForm = "append"
) -> dict[str, tuple[ProfileSpec, ...]]:
    """Optimization profiles of the three graphs, by graph name."""
    images = vision_profiles(MAX_IMAGES)
    most = min(MAX_IMAGES * model.image_tokens, model.max_positions)
    kind = _WEIGHT_KINDS[dtype]
    decoder = decoder_profiles(model.max_positions, model.image_tokens, kind, most, kv_form)
    return {"vision_encoder": images, "projector": images, "decoder": decoder}


def _build_all(
    graphs: Mapping[str, Path],
    model: ModelSpec,
    dtype: str,
    target: Target,
    folder: Path,
    progress: Progress | None,
    compute_capability: tuple[int, int] | None = None,
    workspace_bytes: int | None = None,
    kv_form: KvForm = "append",
) -> dict[str, BuildResult]:
    results = {}
    profiles = graph_profiles(model, dtype, kv_form)
    for index, (name, path) in enumerate(graphs.items()):
        label = f"{name}.plan"

        def report(state: BuildProgress, index: int = index, label: str = label) -> None:
            if progress is not None:
                done = int((index + state.fraction) * _STEPS)
                progress(done, len(graphs) * _STEPS, label)

        results[name] = build_engine(
            path,
            folder / label,
            profiles[name],
            target=target,
            timing_cache=folder / TIMING_CACHE,
            compute_capability=compute_capability,
            workspace_bytes=workspace_bytes,
            progress=report,
        )
        if progress is not None:
            progress((index + 1) * _STEPS, len(graphs) * _STEPS, label)
    return results


def build_engines(
    bundle: Bundle, progress: Progress | None = None, workspace_bytes: int | None = None
) -> dict[str, Any]:
    """Build the plans of a bundle on this machine and put them into it.

    Plans of the same TensorRT and GPU are replaced, and their timing cache is used again;
    others stay.

    Args:
        workspace_bytes: limit of TensorRT's scratch memory; None for TensorRT's own.

    Returns:
        The build record: ``folder``, ``target``, ``tensorrt_version`` and ``plans`` by graph.

    Raises:
        EngineError: the bundle's target has no engines, this machine cannot build them, or
            TensorRT gives up.
        MissingPackageError: TensorRT is not installed.
    """
    manifest = bundle.manifest
    target = get_target(manifest.target, manifest.jetpack)
    if not target.has_engines:
        raise EngineError(
            f"The bundle is for target {target.name!r}, which runs the ONNX files as they "
            "are: there is nothing to build. Answer with `mvlm run`."
        )
    version = str(load_tensorrt(target.runtime).__version__)
    key = target.plan_folder(version, engine_capability(target))
    engines = bundle.path / ENGINES
    engines.mkdir(exist_ok=True)
    place = engines / key
    partial = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=engines))
    try:
        partial.chmod(0o755)
        if (place / TIMING_CACHE).is_file():
            shutil.copyfile(place / TIMING_CACHE, partial / TIMING_CACHE)
        graphs = {name: bundle.graph_path(name) for name in manifest.graphs}
        dtype = manifest.graphs["decoder"].dtype
        results = _build_all(
            graphs,
            manifest.model,
            dtype,
            target,
            partial,
            progress,
            workspace_bytes=workspace_bytes,
            kv_form=manifest.kv_form,
        )
        record = {
            "folder": key,
            "target": target.name,
            "tensorrt_version": version,
            "plans": _plan_records(bundle, partial, results),
        }
        write_json(partial / BUILD_FILE, record)
        replace_folder(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not any(engines.iterdir()):
            engines.rmdir()
    return record


def _plan_records(
    bundle: Bundle, folder: Path, results: Mapping[str, BuildResult]
) -> dict[str, Any]:
    manifest = bundle.manifest
    dtype = manifest.graphs["decoder"].dtype
    profiles = graph_profiles(manifest.model, dtype, manifest.kv_form)
    records = {}
    for name, result in results.items():
        graph_folder = Path(manifest.graphs[name].file).parent.as_posix()
        sources = {
            file: digest
            for file, digest in manifest.files.items()
            if Path(file).parent.as_posix() == graph_folder
        }
        records[name] = {
            **result.to_json(),
            "sha256": sha256_of(folder / result.plan_path.name),
            "profiles": [profile.to_json() for profile in profiles[name]],
            "sources": sources,
        }
    return records


def build_stand_in(
    graphs: Mapping[str, Path],
    model: ModelSpec,
    dtype: str,
    folder: Path,
    progress: Progress | None = None,
    kv_form: KvForm = "append",
) -> dict[str, Any]:
    """Parse and build graphs with TensorRT-RTX to see that they build; the plans are dropped.

    TensorRT-RTX has no compute capability 8.7, so this proves types, shapes and profiles, not
    the device's own build.

    Args:
        folder: an existing folder with room for the plans, in a temporary folder of its own.
        kv_form: of the decoder's cache.

    Raises:
        EngineError: TensorRT-RTX refuses a graph.
        MissingPackageError: it is not installed.
    """
    with tempfile.TemporaryDirectory(prefix=".stand-in.", dir=folder) as place:
        results = _build_all(
            graphs,
            model,
            dtype,
            TARGETS[STAND_IN],
            Path(place),
            progress,
            STAND_IN_CAPABILITY,
            kv_form=kv_form,
        )
        return {name: result.to_json() for name, result in results.items()}
