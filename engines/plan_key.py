"""What a plan depends on, and whether one that lies in a bundle still holds here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .build_options import BuildOptions
from .bundle import BUILD_FILE, ENGINES, Bundle, sha256_of
from .errors import EngineError
from .manifest import Manifest
from .targets import RUNTIME_TITLES, RuntimeKind, Target
from .trt_api import load_tensorrt
from .trt_builder import engine_capability
from .trt_profiles import ProfileSpec

PlanStatus = Literal["fresh", "stale", "foreign", "missing"]


@dataclass(frozen=True)
class BuilderIdentity:
    """The TensorRT and the GPU that plans are made by and for.

    Attributes:
        runtime: "tensorrt" or "tensorrt_rtx".
        version: of that package.
        compute_capability: of the GPU.
    """

    runtime: RuntimeKind
    version: str
    compute_capability: tuple[int, int] | None

    @classmethod
    def of(cls, target: Target) -> BuilderIdentity:
        """This machine's.

        Raises:
            MissingPackageError: TensorRT is not installed.
            EngineError: it is too old.
            InputError: the target has no engines.
        """
        version = str(load_tensorrt(target.runtime).__version__)
        return cls(target.runtime, version, engine_capability(target))

    def __str__(self) -> str:
        title = f"{RUNTIME_TITLES[self.runtime]} {self.version}"
        if self.compute_capability is None:
            return title
        return "{} for compute capability {}.{}".format(title, *self.compute_capability)


@dataclass(frozen=True)
class PlanKey:
    """Everything that decides a plan: equal keys, equal engine.

    Attributes:
        graph: sha256 over names and hashes of the graph's files, as the manifest has them.
    """

    builder: BuilderIdentity
    graph: str
    profiles: tuple[ProfileSpec, ...]
    options: BuildOptions

    @property
    def digest(self) -> str:
        """sha256 of the key as canonical JSON."""
        return _digest(self._values())

    def to_json(self) -> dict[str, Any]:
        """Plain values with the digest, for build.json."""
        return {**self._values(), "digest": self.digest}

    def _values(self) -> dict[str, Any]:
        capability = self.builder.compute_capability
        return {
            "runtime": self.builder.runtime,
            "tensorrt_version": self.builder.version,
            "compute_capability": None if capability is None else list(capability),
            "graph": self.graph,
            "profiles": [profile.to_json() for profile in self.profiles],
            "options": self.options.to_json(),
        }

    def find_difference(self, built: Mapping[str, Any], runs_only: bool = False) -> str | None:
        """The first part in which a stored key differs, in words; None if it is the same.

        Args:
            built: what ``to_json`` gave when the plan was built.
            runs_only: leave out what changes a plan's making and not what it computes.
        """
        wanted = self._values()
        parts = {k: words for k, words in _PARTS.items() if not (runs_only and k == "options")}
        for part, words in parts.items():
            if built.get(part) != wanted[part]:
                old, new = (_shown(part, values.get(part)) for values in (built, wanted))
                return words.format(old=old, new=new)
        return None


_PARTS = {
    "runtime": "it was built by {old}, this is {new}",
    "tensorrt_version": "it was built by TensorRT {old}, this is {new}",
    "compute_capability": "it was built for compute capability {old}, this GPU has {new}",
    "graph": "the graph's files are not those it was built from",
    "profiles": "its profiles were {old}, they would be {new}",
    "options": "its options were {old}, they would be {new}",
}
"""Parts of a key in the order in which they are compared, and the words for a difference."""


def _shown(part: str, value: Any) -> str:  # noqa: ANN401
    if part == "compute_capability" and value:
        return ".".join(map(str, value))
    if part == "profiles" and isinstance(value, list):
        return "; ".join(f"{entry['name']} {entry['dims']}" for entry in value)
    if part == "options" and isinstance(value, Mapping):
        given = {name: entry for name, entry in value.items() if entry is not None}
        return (
            ", ".join(f"{name} {entry}" for name, entry in given.items()) or "TensorRT's own"
        )
    return str(value)


def graph_sources(manifest: Manifest, graph: str) -> dict[str, str]:
    """Hashes of a graph's files by path in the bundle."""
    folder = Path(manifest.graphs[graph].file).parent
    return {
        file: digest
        for file, digest in sorted(manifest.files.items())
        if Path(file).parent == folder
    }


def plan_keys(
    manifest: Manifest,
    builder: BuilderIdentity,
    profiles: Mapping[str, tuple[ProfileSpec, ...]],
    options: BuildOptions,
) -> dict[str, PlanKey]:
    """The key that each graph's plan would get."""
    return {
        name: PlanKey(builder, _digest(graph_sources(manifest, name)), profiles[name], options)
        for name in manifest.graphs
    }


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PlanState:
    """Whether a plan can be used as it lies there.

    Attributes:
        status: ``fresh``: it can; ``stale``: this TensorRT and GPU built it, but something
            has changed; ``foreign``: another TensorRT or GPU did; ``missing``: there is none.
        reason: why, in words that follow the graph's name; "already built" of a fresh one.
    """

    status: PlanStatus
    reason: str


FRESH = PlanState("fresh", "already built")


def read_plan_states(
    bundle: Bundle,
    target: Target,
    keys: Mapping[str, PlanKey],
    runs_only: bool = False,
) -> dict[str, PlanState]:
    """The state of each graph's plan in a bundle.

    Args:
        keys: what the plans should be, by graph; all of one builder.
        runs_only: leave out what changes a plan's making and not what it computes.

    Raises:
        BundleError: a build record cannot be read.
    """
    records = bundle.engines()
    states = {}
    for name, key in keys.items():
        folder = target.plan_folder(key.builder.version, key.builder.compute_capability)
        plan = records.get(folder, {}).get("plans", {}).get(name)
        if plan is not None:
            place = bundle.path / ENGINES / folder
            states[name] = _judge(plan, place, key, runs_only)
        elif records:
            others = ", ".join(sorted(records))
            states[name] = PlanState(
                "foreign", f"the bundle has plans of {others} alone, this is {key.builder}"
            )
        else:
            states[name] = PlanState("missing", "not built yet")
    return states


def _judge(plan: Mapping[str, Any], place: Path, key: PlanKey, runs_only: bool) -> PlanState:
    stored = plan.get("key")
    if not isinstance(stored, Mapping):
        return PlanState("stale", f"its record in {BUILD_FILE} is of an older version")
    difference = key.find_difference(stored, runs_only)
    if difference is not None:
        return PlanState("stale", difference)
    file = place / plan["plan_path"]
    if not file.is_file():
        return PlanState("stale", f"{file.name} is gone")
    if sha256_of(file) != plan["sha256"]:
        return PlanState("stale", f"{file.name} is damaged: it differs from its recorded hash")
    return FRESH


def require_plans(bundle: Bundle, states: Mapping[str, PlanState]) -> None:
    """Refuse plans that are not fresh; what loads them calls this first.

    Raises:
        EngineError: says of each such plan why it cannot be used.
    """
    bad = {name: state for name, state in states.items() if state.status != "fresh"}
    if bad:
        lines = "".join(f"\n  {name}: {s.status}, {s.reason}" for name, s in bad.items())
        raise EngineError(
            f"{bundle.path} has no engines that this machine can run:{lines}\n"
            f"Build them here with `mvlm build {bundle.path}`."
        )
