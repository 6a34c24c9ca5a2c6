"""The records of a parity check, and their JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .parity_metrics import Distance
from .tolerances import Tolerance


@dataclass(frozen=True)
class Verdict:
    """Of one pair of answers.

    Attributes:
        kind: ``tie``: they part where PyTorch itself is undecided.
        reason: a sentence where they are not equal.
    """

    kind: Literal["equal", "tie", "different"]
    reason: str = ""


@dataclass
class GraphParity:
    """Figures of one graph over all samples, and what missed its bound."""

    graph: str
    dtype: str
    values: Distance = field(default_factory=Distance)
    cache: Distance | None = None
    kl: float | None = None
    top1: float | None = None
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, found: Distance, bound: Tolerance) -> None:
        """Note what misses its bound; a figure that is not a number misses it."""
        if not math.isfinite(found.relative):
            self.failures.append(f"{name} are not finite, here or in PyTorch")
            return
        if not found.relative <= bound.relative:
            self.failures.append(
                f"{name} differ by {found.relative:.2e} (relative), bound {bound.relative:.0e}"
            )
        if not found.cosine >= bound.cosine:
            self.failures.append(
                f"{name} have cosine {found.cosine:.6f}, bound {bound.cosine}"
            )

    def check_tokens(self, kl: float, top1: float, bound: Tolerance) -> None:
        """Keep the decoder's figures on next tokens, and note what misses its bound."""
        self.kl, self.top1 = kl, top1
        if not kl <= bound.kl:
            self.failures.append(f"KL {kl:.2e} nats, bound {bound.kl:.0e}")
        if not top1 >= bound.top1:
            self.failures.append(f"top-1 agrees on {top1:.4f}, bound {bound.top1}")


@dataclass
class EndToEndParity:
    """Greedy answers of the runtime beside PyTorch's.

    Attributes:
        equal: answers with the same tokens, the one that ended them included.
        ties: answers that part where PyTorch itself is undecided (``Tolerance.tie``).
        accuracy, reference_accuracy: share of exact answers, None without known answers.
    """

    samples: int
    equal: int = 0
    ties: int = 0
    accuracy: float | None = None
    reference_accuracy: float | None = None
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class ParityReport:
    """All of it; ``passed`` when no bound was missed."""

    graphs: list[GraphParity]
    end_to_end: EndToEndParity

    @property
    def failures(self) -> list[str]:
        """What missed its bound, with the graph in front."""
        parts = [f"{g.graph}: {text}" for g in self.graphs for text in g.failures]
        return parts + [f"end to end: {text}" for text in self.end_to_end.failures]

    @property
    def passed(self) -> bool:
        """Whether nothing missed its bound."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """A JSON object; figures that JSON has no number for become "inf", "-inf", "nan"."""
        report = {"passed": self.passed, "failures": self.failures, **asdict(self)}
        return {key: _as_json(value) for key, value in report.items()}


def _as_json(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
