"""What ``mvlm inspect`` finds out: statistics of graphs, and what a bundle holds."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.kv_cache import cache_names
from mvlm_export.passes.bound_shapes import graph_inputs, shape_of
from mvlm_export.passes.comparison import Comparison, compare
from mvlm_export.passes.macs import PAST_LENGTH, MacCount, count_macs
from mvlm_export.passes.statistics import GraphStatistics, model_statistics, read_model

DEFAULTS = {"B": 1, "I": 1, "S": 1, "T": 1024}
"""Dynamic axes: images, image rows, new tokens, tokens in the cache."""

LONGEST = 2**31 - 1
"""Largest value of an axis."""

PREFILL = {"S": 256, "T": 0}
DECODE = {"S": 1, "T": 1024}


@dataclass(frozen=True)
class Workload:
    """Multiply-accumulates of one use of a graph."""

    name: str
    macs: MacCount

    @property
    def title(self) -> str:
        """``prefill S=256 T=0``; the rows of an image make no difference."""
        axes = (f"{name}={size}" for name, size in self.macs.axes.items() if name != "I")
        return " ".join((self.name, *axes))


@dataclass(frozen=True)
class GraphReport:
    """One graph.

    Attributes:
        file_bytes: of the .onnx file and of each external data file that it names; None for
            one that is not there.
    """

    path: Path
    statistics: GraphStatistics
    workloads: tuple[Workload, ...]
    file_bytes: Mapping[str, int | None]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        statistics = self.statistics.to_json()
        del statistics["macs"]
        return {
            "path": str(self.path),
            **statistics,
            "macs": {item.name: item.macs.to_json() for item in self.workloads},
            "file_bytes": dict(self.file_bytes),
        }


@dataclass(frozen=True)
class BundleReport:
    """A bundle: its graphs and all that lies beside them.

    Attributes:
        passes: records of the compiler's passes by graph; empty if it wrote none.
        engines: build records by folder.
        prefix_tokens: ids whose cache rows are shipped; None if there are none.
        files: bytes of every file.
    """

    bundle: Bundle
    graphs: Mapping[str, GraphReport]
    passes: Mapping[str, Sequence[Mapping[str, Any]]]
    engines: Mapping[str, Mapping[str, Any]]
    prefix_tokens: int | None
    files: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        manifest = self.bundle.manifest
        return {
            "path": str(self.bundle.path),
            "model": asdict(manifest.model),
            "target": manifest.target,
            "jetpack": manifest.jetpack,
            "recipe": manifest.recipe,
            "kv_form": manifest.kv_form,
            "dtypes": {name: spec.dtype for name, spec in manifest.graphs.items()},
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "passes": {name: list(records) for name, records in self.passes.items()},
            "engines": dict(self.engines),
            "prefix_tokens": self.prefix_tokens,
            "files": dict(self.files),
        }


@dataclass(frozen=True)
class ComparisonReport:
    """Two graphs compared.

    Attributes:
        graph: its name in a bundle; None for two files.
        comparisons: by what the multiply-accumulates are counted for, ``decode S=1 T=1024``.
    """

    graph: str | None
    before: Path
    after: Path
    comparisons: Mapping[str, Comparison]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "graph": self.graph,
            "before": str(self.before),
            "after": str(self.after),
            "comparisons": {use: item.to_json() for use, item in self.comparisons.items()},
        }


def parse_axes(settings: Sequence[str]) -> dict[str, int]:
    """Values of dynamic axes from ``S=200`` or ``S=200,T=0``.

    Raises:
        InputError: not of that form.
    """
    axes = {}
    for part in ",".join(settings).replace(" ", ",").split(","):
        name, equals, value = part.partition("=")
        if not part:
            continue
        if not (name and equals and value.isascii() and value.isdigit()):
            raise InputError(
                f"--set {part!r} is not of the form AXIS=NUMBER. Write --set S=200, or "
                "--set S=200,T=0."
            )
        if len(value) > 10 or int(value) > LONGEST:
            raise InputError(
                f"--set {part!r} is too large: an axis has at most {LONGEST} rows."
            )
        axes[name] = int(value)
    return axes


def inspect_graph(path: Path, axes: Mapping[str, int]) -> GraphReport:
    """Examine one .onnx file.

    Args:
        axes: values of dynamic axes that were asked for; see :func:`require_axes`.

    Raises:
        MvlmError: no ONNX model.
    """
    model = read_model(path)
    return _report(path, model, axes, _longest_past([model]))


def inspect_bundle(path: Path, axes: Mapping[str, int]) -> BundleReport:
    """Examine a bundle; its files are not compared with their hashes.

    Raises:
        MvlmError: no bundle, or a graph that cannot be read.
    """
    bundle = Bundle.load(path, verify=False)
    longest = bundle.manifest.model.max_positions
    graphs = {}
    for name in bundle.manifest.graphs:
        file = path / bundle.manifest.graphs[name].file
        graphs[name] = _report(file, read_model(file), axes, longest - 1)
    return BundleReport(
        bundle=bundle,
        graphs=graphs,
        passes=_passes(bundle),
        engines=bundle.engines(),
        prefix_tokens=_prefix_tokens(bundle),
        files={
            file.relative_to(path).as_posix(): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file()
        },
    )


def compare_paths(
    before: Path, after: Path, axes: Mapping[str, int]
) -> list[ComparisonReport]:
    """Compare two graphs, or each graph of two bundles, which are given as folders.

    Raises:
        MvlmError: as for one, or a graph and a bundle.
    """
    if before.is_dir() != after.is_dir():
        raise InputError(
            f"{before} and {after} are a bundle and a graph. Compare two graphs, or two "
            "bundles."
        )
    if not before.is_dir():
        models = [read_model(path) for path in (before, after)]
        longest = _longest_past(models)
        pair = [
            _report(path, model, axes, longest)
            for path, model in zip((before, after), models, strict=True)
        ]
        require_axes(axes, pair)
        return [_compare(None, *pair)]
    old, new = (inspect_bundle(path, axes).graphs for path in (before, after))
    require_axes(axes, (*old.values(), *new.values()))
    return [_compare(name, old[name], new[name]) for name in old]


def _compare(name: str | None, before: GraphReport, after: GraphReport) -> ComparisonReport:
    """Prefill with prefill, decode with decode; else the first use of each."""
    found = {}
    later = {item.name: item for item in after.workloads}
    for item in before.workloads:
        other = later.get(item.name, after.workloads[0])
        found[item.title] = compare(
            replace(before.statistics, macs=item.macs),
            replace(after.statistics, macs=other.macs),
        )
    return ComparisonReport(name, before.path, after.path, found)


def _report(
    path: Path, model: onnx.ModelProto, axes: Mapping[str, int], longest: int
) -> GraphReport:
    """Examine a model whose cache holds ``longest`` tokens and a new one."""
    statistics = model_statistics(model, {**DEFAULTS, **axes})
    uses = _uses(statistics.axes, axes, longest)
    workloads = tuple(Workload(name, count_macs(model, use)) for name, use in uses.items())
    return GraphReport(path, statistics, workloads, _file_bytes(path, model))


def _longest_past(models: Iterable[onnx.ModelProto]) -> int:
    """Rows that each model's cache has room for before a new one; 1024 if any number.

    A cache of the fixed form is [1, heads, rows, width].
    """
    longest = DECODE["T"]
    for model in models:
        shapes = {value.name: shape_of(value) for value in graph_inputs(model.graph)}
        past = shapes.get(cache_names("past_key_values", 1)[0]) or ()
        if PAST_LENGTH in shapes and len(past) == 4 and isinstance(past[2], int):
            longest = min(longest, max(past[2] - 1, 1))
    return longest


def _uses(
    names: Collection[str], axes: Mapping[str, int], longest: int
) -> dict[str, dict[str, int]]:
    """Prefill and decode of a decoder, unless the length was asked for; else one run."""
    if "S" not in names or {"S", "T"} & set(axes):
        return {"run": {**DEFAULTS, **axes}}
    prefill = {**PREFILL, "S": min(PREFILL["S"], longest)}
    decode = {**DECODE, "T": min(DECODE["T"], longest)}
    return {
        "prefill": {**DEFAULTS, **prefill, **axes},
        "decode": {**DEFAULTS, **decode, **axes},
    }


def require_axes(axes: Mapping[str, int], graphs: Iterable[GraphReport]) -> None:
    """Check that each axis that was asked for is in one of the graphs.

    Raises:
        InputError: one is in none.
    """
    known = {name: None for graph in graphs for name in graph.statistics.axes}
    for name in axes:
        if name not in known:
            raise InputError(
                f"There is no dynamic axis {name!r} to set. The axes are: "
                f"{', '.join(known) or 'none, all shapes are fixed'}."
            )


def _file_bytes(path: Path, model: onnx.ModelProto) -> dict[str, int | None]:
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    files = [path, *(path.parent / name for name in sorted(names))]
    return {file.name: file.stat().st_size if file.is_file() else None for file in files}


def _passes(bundle: Bundle) -> dict[str, list[Mapping[str, Any]]]:
    """The pass report of the manifest; what is not of its form is left out."""
    recorded = bundle.manifest.checks.get("passes")
    if not isinstance(recorded, Mapping):
        return {}
    return {
        name: [record for record in records if _is_record(record)]
        for name, records in recorded.items()
        if isinstance(records, (list, tuple))
    }


def _is_record(record: object) -> bool:
    """Whether a pass's record has a name, counts, pairs of sizes and refusals of its form."""
    if not isinstance(record, Mapping):
        return False
    counts = [record.get(key) for key in ("matched", "rewritten")]
    pairs = [record.get(key, [0, 0]) for key in ("nodes", "initializers", "bytes")]
    refusals = record.get("refusals", [])
    if not all(isinstance(item, (list, tuple)) for item in (*pairs, refusals)):
        return False
    return (
        isinstance(record.get("name"), str)
        and all(type(count) is int for count in (*counts, *chain(*pairs)))
        and all(len(pair) == 2 for pair in pairs)
        and all(isinstance(refusal, Mapping) for refusal in refusals)
    )


def _prefix_tokens(bundle: Bundle) -> int | None:
    path = bundle.prefix_path
    if path is None:
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            return int(data["ids"].shape[0])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read ({error}). Copy the bundle again, or compile it again."
        ) from error
