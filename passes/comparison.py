"""What changed between two graphs, from the statistics of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .statistics import GraphStatistics, TensorInfo


@dataclass(frozen=True)
class Change:
    """A figure before and after."""

    before: int
    after: int

    @property
    def ratio(self) -> float | None:
        """After by before; None if there was nothing before."""
        return self.after / self.before if self.before else None

    @property
    def difference(self) -> int:
        """After less before."""
        return self.after - self.before

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"before": self.before, "after": self.after, "ratio": self.ratio}


@dataclass(frozen=True)
class TensorChange:
    """An input or output that came, went, or became another; None where it is not there."""

    name: str
    before: TensorInfo | None
    after: TensorInfo | None


@dataclass(frozen=True)
class Comparison:
    """What became of a graph.

    Attributes:
        operators: nodes of each operator whose count changed.
        macs_by_operator: of each operator whose multiply-accumulates changed.
        uncounted: nodes whose multiply-accumulates are missing in ``macs``.
        bytes: of constants, in all.
        bytes_by_dtype: of constants, each dtype of either graph.
    """

    nodes: Change
    operators: Mapping[str, Change]
    macs: Change
    macs_by_operator: Mapping[str, Change]
    uncounted: Change
    bytes: Change
    bytes_by_dtype: Mapping[str, Change]
    inputs: tuple[TensorChange, ...] = ()
    outputs: tuple[TensorChange, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        data: dict[str, Any] = {}
        for key, value in vars(self).items():
            if isinstance(value, Change):
                data[key] = value.to_json()
            elif isinstance(value, Mapping):
                data[key] = {name: change.to_json() for name, change in value.items()}
            else:
                data[key] = [asdict(change) for change in value]
        return data


def compare(before: GraphStatistics, after: GraphStatistics) -> Comparison:
    """What changed between two graphs."""
    return Comparison(
        nodes=Change(before.nodes, after.nodes),
        operators=_changed(_changes(before.operators, after.operators)),
        macs=Change(before.macs.total, after.macs.total),
        macs_by_operator=_changed(_changes(before.macs.by_operator, after.macs.by_operator)),
        uncounted=Change(len(before.macs.uncounted), len(after.macs.uncounted)),
        bytes=Change(before.weight_bytes, after.weight_bytes),
        bytes_by_dtype=_changes(*map(_bytes_by_dtype, (before, after))),
        inputs=_tensor_changes(before.inputs, after.inputs),
        outputs=_tensor_changes(before.outputs, after.outputs),
    )


def _bytes_by_dtype(statistics: GraphStatistics) -> dict[str, int]:
    return {dtype: total.bytes for dtype, total in statistics.weights.items()}


def _changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, Change]:
    names = dict.fromkeys((*before, *after))
    return {name: Change(before.get(name, 0), after.get(name, 0)) for name in names}


def _changed(changes: Mapping[str, Change]) -> dict[str, Change]:
    return {name: item for name, item in changes.items() if item.before != item.after}


def _tensor_changes(
    before: tuple[TensorInfo, ...], after: tuple[TensorInfo, ...]
) -> tuple[TensorChange, ...]:
    old, new = ({tensor.name: tensor for tensor in side} for side in (before, after))
    names = dict.fromkeys((*old, *new))
    changes = [TensorChange(name, old.get(name), new.get(name)) for name in names]
    return tuple(change for change in changes if change.before != change.after)
