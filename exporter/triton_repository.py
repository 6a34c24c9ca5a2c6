"""A model repository for NVIDIA's Triton Inference Server, made from a bundle.

``mvlm`` is the model to ask: it answers with this package's runtime on the bundle itself,
which it opens where the repository says. ``vision_encoder``, ``projector`` and ``decoder`` are
the bundle's graphs or plans, for clients that drive them on their own; Triton's own backends
run them. A graph that those backends cannot run is left out, with the reason.

The repository is written beside its place and renamed when whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvlm_export.engines import triton_front
from mvlm_export.engines.bundle import ENGINES, Bundle, replace_folder
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.manifest import GRAPHS, GraphSpec, Manifest, TensorSpec
from mvlm_export.engines.targets import RUNTIME_TITLES, RuntimeKind, Target, get_target

from .triton_config import ConfigTensor, TritonConfig

FRONT = "mvlm"
"""The model that answers questions."""

CONFIG = "config.pbtxt"
VERSION = "1"

PLATFORMS: Mapping[RuntimeKind, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime_onnx", "model.onnx"),
    "tensorrt": ("tensorrt_plan", "model.plan"),
}
"""Triton's name of what runs a target's graphs, and of the model in a version's folder.

An ONNX model is a folder, since its weights lie in a file of their own."""

DATA_TYPES: Mapping[str, str] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
"""Element types of a manifest, by Triton's names."""

MAX_BATCH = 4
"""Images in one call of an ONNX graph; a plan's own profile says how many it takes."""

BuildRecord = Mapping[str, Any]


@dataclass(frozen=True)
class WrittenModel:
    """One model of the repository.

    Attributes:
        runs_on: Triton's name of what runs it.
        size: of its files in bytes.
    """

    name: str
    runs_on: str
    max_batch_size: int
    size: int


@dataclass(frozen=True)
class WrittenRepository:
    """What was written.

    Attributes:
        bundle: the path that the server will open.
        left_out: why a graph is not there, by name.
    """

    path: Path
    bundle: str
    models: tuple[WrittenModel, ...]
    left_out: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Source:
    """What becomes a model: its configuration, and files by their path below the version."""

    config: TritonConfig
    files: Mapping[str, Path]


def write_repository(
    bundle: Bundle,
    output: Path,
    overwrite: bool = False,
    engines: str | None = None,
    bundle_path: str | None = None,
    loading: Mapping[str, str] | None = None,
) -> WrittenRepository:
    """Write the model repository of a bundle.

    Graphs and plans are hard links where the file system allows it, else copies.

    Args:
        output: the repository's folder.
        overwrite: replace a repository that is there.
        engines: folder of the plans in the bundle; None takes the only one.
        bundle_path: the bundle's path where the server runs; a relative one begins at the
            folder of the model ``mvlm``. None writes the absolute path it has here.
        loading: keywords of ``VLM.load`` as texts, by their names in
            ``engines.triton_front.LOADING``.

    Raises:
        EngineError: the bundle has no plans for the model that should run them, or old ones.
        InputError: there are several folders of plans, or ``output`` cannot be used.
    """
    manifest = bundle.manifest
    target = get_target(manifest.target, manifest.jetpack)
    left_out = {name: why for name in GRAPHS if (why := _why_not(manifest, target, name))}
    served = [name for name in GRAPHS if name not in left_out]
    record = _choose_record(bundle, target, engines) if served and target.has_engines else None
    place = bundle_path or str(bundle.path.resolve())
    parameters = {triton_front.BUNDLE: place, **(loading or {})}
    threads = (loading or {}).get("threads")
    sources = [_graph_source(bundle, target, name, record, threads) for name in served]
    sources.append(_front_source(parameters))
    with _new_folder(output, bundle.path, overwrite) as folder:
        models = tuple(_write_model(folder, source) for source in sources)
    return WrittenRepository(output.resolve(), place, models, left_out)


def _why_not(manifest: Manifest, target: Target, name: str) -> str | None:
    """Why Triton's own backends cannot run a graph; None if they can."""
    if target.runtime not in PLATFORMS:
        return f"Triton has no backend for plans of {RUNTIME_TITLES[target.runtime]}"
    if name == "decoder" and target.has_engines and manifest.kv_form == "fixed":
        return (
            "its plan needs each cache tensor's input and output at one address, which "
            "Triton's TensorRT backend does not give"
        )
    return None


def _choose_record(bundle: Bundle, target: Target, engines: str | None) -> BuildRecord:
    """The build record whose plans are served, checked to be of this bundle's graphs."""
    records = bundle.engines()
    known = ", ".join(records)
    if not records:
        raise EngineError(
            f"{bundle.path} is for {target.title} and has no plans yet, which Triton's "
            "TensorRT backend runs. Build them on the device with "
            f"`mvlm build {bundle.path}`, then write the repository there."
        )
    if engines is None and len(records) > 1:
        raise InputError(
            f"{bundle.path} has {len(records)} folders of plans: {known}. Name the one for "
            "the server's GPU with --engines."
        )
    record = records.get(engines or known)
    if record is None:
        raise InputError(
            f"{bundle.path / ENGINES} has no folder {engines!r}. Give one of: {known}."
        )
    _check_plans(bundle, engines or known, record)
    return record


def _check_plans(bundle: Bundle, folder: str, record: BuildRecord) -> None:
    files = bundle.manifest.files
    plans = record["plans"]
    good = all(
        name in plans
        and all(files.get(path) == digest for path, digest in plans[name]["sources"].items())
        for name in GRAPHS
    )
    if not good:
        raise EngineError(
            f"The plans in {bundle.path / ENGINES / folder} are not those of this bundle's "
            f"graphs. Build them again with `mvlm build {bundle.path}`."
        )


def _graph_source(
    bundle: Bundle, target: Target, name: str, record: BuildRecord | None, threads: str | None
) -> _Source:
    graph = bundle.manifest.graphs[name]
    platform, file = PLATFORMS[target.runtime]
    axis = _batch_axis(graph)
    if record is None:
        files, batch = _onnx_files(bundle.graph_path(name), file), MAX_BATCH
        profiles: tuple[int, ...] = ()
        parameters = {} if threads is None else {"intra_op_thread_count": threads}
    else:
        plan = record["plans"][name]
        files = {file: bundle.path / ENGINES / record["folder"] / plan["plan_path"]}
        batch = max(int(p["dims"].get(axis, (1, 1, 1))[2]) for p in plan["profiles"])
        profiles, parameters = tuple(range(len(plan["profiles"]))), {}
    on_gpu = target.has_engines or target.provider == "cuda"
    config = TritonConfig(
        name,
        ("platform", platform),
        tuple(_config_tensor(tensor, axis) for tensor in graph.inputs),
        tuple(_config_tensor(tensor, axis) for tensor in graph.outputs),
        "KIND_GPU" if on_gpu else "KIND_CPU",
        max_batch_size=batch if axis else 0,
        profiles=profiles,
        parameters=parameters,
    )
    return _Source(config, files)


def _onnx_files(graph: Path, folder: str) -> dict[str, Path]:
    """A graph and its weights by their paths in the version, under the names they have."""
    data = graph.with_name(f"{graph.name}.data")
    found = [graph, data] if data.is_file() else [graph]
    return {f"{folder}/{path.name}": path for path in found}


def _batch_axis(graph: GraphSpec) -> str | None:
    """Name of the open first axis that all tensors share; None if there is none."""
    tensors = (*graph.inputs, *graph.outputs)
    first = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    axis = first.pop() if len(first) == 1 else None
    return axis if isinstance(axis, str) else None


def _config_tensor(tensor: TensorSpec, batch_axis: str | None) -> ConfigTensor:
    shape = tensor.shape[1:] if batch_axis else tensor.shape
    dims = tuple(size if isinstance(size, int) else -1 for size in shape)
    return ConfigTensor(tensor.name, DATA_TYPES[tensor.dtype], dims)


def _front_source(parameters: Mapping[str, str]) -> _Source:
    """The model that answers; one instance, which Triton gives and takes host memory."""
    config = TritonConfig(
        FRONT,
        ("backend", "python"),
        tuple(_front_tensor(tensor) for tensor in triton_front.INPUTS),
        tuple(_front_tensor(tensor) for tensor in triton_front.OUTPUTS),
        "KIND_CPU",
        parameters=parameters,
        decoupled=True,
    )
    return _Source(config, {"model.py": Path(triton_front.__file__)})


def _front_tensor(tensor: triton_front.FrontTensor) -> ConfigTensor:
    return ConfigTensor(tensor.name, tensor.data_type, (tensor.size,), tensor.optional)


def _write_model(repository: Path, source: _Source) -> WrittenModel:
    config = source.config
    version = repository / config.name / VERSION
    for name, file in source.files.items():
        place = version / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if config.name == FRONT:
            shutil.copyfile(file, place)
        else:
            _link_or_copy(file, place)
    text = config.to_text()
    (repository / config.name / CONFIG).write_text(text, encoding="ascii")
    size = sum(file.stat().st_size for file in source.files.values()) + len(text)
    return WrittenModel(config.name, config.runs_on[1], config.max_batch_size, size)


def _link_or_copy(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, place)


@contextmanager
def _new_folder(place: Path, bundle: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``place``, which is renamed to it at the end.

    Raises:
        InputError: ``place`` cannot be written, or holds what must stay.
    """
    place = place.resolve()
    _check_place(place, bundle.resolve(), overwrite)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise InputError(
            f"Cannot write the repository to {place}: {error.strerror or error}. Choose "
            "another --output."
        ) from error
    try:
        folder.chmod(0o755)
        yield folder
        replace_folder(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_place(place: Path, bundle: Path, overwrite: bool) -> None:
    if place.is_relative_to(bundle):
        raise InputError(
            f"{place} is in the bundle, which is replaced as a whole when it is compiled "
            "again. Choose a folder beside it as --output."
        )
    if place == Path.cwd() or os.path.ismount(place):
        raise InputError(
            f"{place} is the working folder or a mount point, which cannot be replaced as a "
            "whole. Choose a folder inside it as --output."
        )
    if not place.exists():
        return
    if not place.is_dir():
        raise InputError(f"{place} is a file. Choose another --output.")
    found = {path.name for path in place.iterdir()}
    ours = (place / FRONT / CONFIG).is_file() and found <= {FRONT, *GRAPHS}
    if found and not ours:
        raise InputError(
            f"{place} holds other files than `mvlm triton` writes, so it is left alone. "
            "Choose another --output."
        )
    if found and not overwrite:
        raise InputError(
            f"{place} already holds a model repository. Add --overwrite to replace it, or "
            "choose another --output."
        )
