"""What became of a build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .build_options import BuildOptions
from .trt_profiles import ShapeRange


@dataclass(frozen=True)
class BuildResult:
    """A plan that was built.

    Attributes:
        plan_path: where it lies.
        plan_bytes: its size.
        seconds: wall clock of parse and build.
        weights_memory: bytes of weights the engine holds, from TensorRT's log; None if the log
            does not say. Well over the ONNX weights means that profiles do not share them.
        activation_memory: bytes of scratch for each profile, by name.
        tensorrt_version: version of the package that built it.
        kind: "tensorrt" or "tensorrt_rtx".
        compute_capability: of the GPU it is for; None if the package chose the one it found.
        profiles: names in the order of their indices.
        shapes: (min, opt, max) of each input with an open axis, by profile and input.
        options: what the build was told.
        warnings: TensorRT's and the builder's, distinct; known harmless ones too.
        peak_memory: largest resident set of the building process in bytes; None if the build
            had no process of its own.
    """

    plan_path: Path
    plan_bytes: int
    seconds: float
    weights_memory: int | None
    activation_memory: dict[str, int]
    tensorrt_version: str
    kind: str
    compute_capability: tuple[int, int] | None
    profiles: tuple[str, ...]
    shapes: dict[str, dict[str, ShapeRange]]
    options: BuildOptions
    warnings: tuple[str, ...]
    peak_memory: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for build.json."""
        capability = list(self.compute_capability) if self.compute_capability else None
        return {
            **asdict(self),
            "plan_path": self.plan_path.name,
            "compute_capability": capability,
            "profiles": list(self.profiles),
            "shapes": {
                profile: {name: [list(shape) for shape in r] for name, r in inputs.items()}
                for profile, inputs in self.shapes.items()
            },
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], plan_path: Path) -> BuildResult:
        """What ``to_json`` wrote, for a plan that lies at ``plan_path``."""
        capability = data["compute_capability"]
        return cls(
            **{
                **data,
                "plan_path": plan_path,
                "compute_capability": None if capability is None else tuple(capability),
                "profiles": tuple(data["profiles"]),
                "shapes": {
                    profile: {name: read_range(entry) for name, entry in inputs.items()}
                    for profile, inputs in data["shapes"].items()
                },
                "options": BuildOptions.from_json(data["options"]),
                "warnings": tuple(data["warnings"]),
            }
        )


def read_range(data: list[list[int]]) -> ShapeRange:
    """The (min, opt, max) shapes that JSON made lists of."""
    low, opt, high = (tuple(shape) for shape in data)
    return low, opt, high
