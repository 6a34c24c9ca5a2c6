"""What the TensorRT sessions know of an engine: tensors, profiles, and one run of it.

The border is narrow, so that the sessions are the same for TensorRT 10.3, TensorRT-RTX and the
stand-in of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

Shape = tuple[int, ...]


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine.

    Attributes:
        dtype: numpy's name of the element type.
        shape: -1 where a size is open.
        on_host: True if its address is one of the host's: TensorRT reads shapes from it.
    """

    name: str
    dtype: str
    shape: Shape
    is_input: bool
    on_host: bool = False


@dataclass(frozen=True)
class ShapeLimits:
    """Smallest and largest shape of an input in a profile."""

    low: Shape
    high: Shape

    def admits(self, shape: Shape) -> bool:
        """Whether ``shape`` lies between them in every dimension."""
        if len(shape) != len(self.low):
            return False
        ranges = zip(self.low, shape, self.high, strict=True)
        return all(low <= size <= high for low, size, high in ranges)


class EngineRunner(Protocol):
    """Runs an engine in one of its profiles, with scratch memory of its own.

    Shapes and addresses stay from one run to the next. Nothing is waited for: runs and copies
    are queued in order on the stream of the device's memory.
    """

    @property
    def can_be_captured(self) -> bool:
        """Whether ``execute`` may be recorded by ``DeviceMemory.capture`` now."""

    def set_input_shape(self, name: str, shape: Shape) -> None:
        """The shape of the next run's input.

        Raises:
            EngineError: the profile does not admit it.
        """

    def set_tensor_address(self, name: str, address: int) -> None:
        """Where an input or output lies: a multiple of 256, not null even for no elements.

        Raises:
            EngineError: the address cannot be used.
        """

    def output_shape(self, name: str) -> Shape:
        """An output's shape for the inputs' shapes as they are set.

        Raises:
            EngineError: it does not follow from them.
        """

    def execute(self) -> None:
        """Queue a run.

        Raises:
            EngineError: it was refused; errors of the run itself come with ``synchronize``.
        """


class Engine(Protocol):
    """A loaded plan."""

    @property
    def name(self) -> str:
        """The graph's name in the bundle."""

    @property
    def tensors(self) -> Mapping[str, EngineTensor]:
        """Inputs and outputs by name, in the engine's order."""

    @property
    def profile_count(self) -> int:
        """Number of optimization profiles, 1 or more."""

    def limits(self, name: str, profile: int) -> ShapeLimits:
        """What a profile admits for an input."""

    def open_runner(self, profile: int) -> EngineRunner:
        """A new runner for a profile.

        Raises:
            EngineError: there is no memory for it.
        """
