"""What a build can be told, and what of it follows from the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import InputError
from .jetson import Jetson
from .targets import Target, get_target

WORKSPACE_SHARE = 0.25
"""Part of a module's memory that TensorRT's scratch may take where no limit is given.

CPU and GPU of a Jetson share one memory, which also has to hold the ONNX weights, the engine
under construction and the system. A quarter is 2 GiB of an 8 GB module, where the decoder of
1.4B in FP16 reports 61 MB of scratch (TensorRT-RTX 1.7.1, prefill of 1024 rows). Chosen by
that sum, not measured on a device.
"""
_LEVELS = range(6)


@dataclass(frozen=True)
class BuildOptions:
    """Choices of a build that change the plan.

    Attributes:
        workspace_bytes: scratch limit for a tactic; None leaves TensorRT's own, which is all
            of the device's memory.
        optimization_level: 0 (fast build) to 5 (longest search); None leaves TensorRT's own,
            which is 3.

    Raises:
        InputError: a limit that is not positive, or a level that does not exist.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise InputError(
                f"The workspace limit is {self.workspace_bytes} bytes. Give a positive "
                "number, or none for the default."
            )
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            raise InputError(
                f"There is no builder optimization level {self.optimization_level}. Choose "
                f"{_LEVELS[0]} to {_LEVELS[-1]}, or none for TensorRT's own."
            )

    def for_target(self, target: Target, jetson: Jetson | None = None) -> BuildOptions:
        """The same with the device's workspace limit filled in where none was given."""
        if self.workspace_bytes is not None:
            return self
        return replace(self, workspace_bytes=default_workspace(target, jetson))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for build.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildOptions:
        """What ``to_json`` wrote."""
        return cls(data["workspace_bytes"], data["optimization_level"])


def default_workspace(target: Target, jetson: Jetson | None = None) -> int | None:
    """Scratch limit in bytes by the module's memory; None where that varies.

    Args:
        target: of the bundle.
        jetson: the device that builds, where it is one: a bundle may be built on another
            module than it was compiled for.
    """
    if jetson is not None and jetson.target is not None:
        target = get_target(jetson.target)
    if target.memory_gb is None:
        return None
    return int(target.memory_gb * WORKSPACE_SHARE * 2**30)
