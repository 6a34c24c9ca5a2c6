"""The records of a parity check, and their JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .accuracy_report import AccuracyReport, as_json
from .parity_metrics import Distance
from .tolerances import Tolerance


@dataclass(frozen=True)
class Verdict:
    """Of one pair of answers.

    Attributes:
        kind: ``tie``: they part where PyTorch itself is undecided; ``failed``: the runtime
            gave no answer.
        reason: a sentence where they are not equal.
    """

    kind: Literal["equal", "tie", "different", "failed"]
    reason: str = ""


@dataclass
class GraphParity:
    """Figures of one graph over all samples, and what missed its bound.

    Attributes:
        precision: a key of ``tolerances.TOLERANCES``.
        kl: of the decoder's next tokens in nats, worst row.
        kl_mean: mean over the rows that give an answer.
        top1: share of rows whose best token agrees; of an integer decoder, of those rows.
    """

    graph: str
    precision: str
    values: Distance = field(default_factory=Distance)
    cache: Distance | None = None
    kl: float | None = None
    kl_mean: float | None = None
    top1: float | None = None
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, found: Distance, bound: Tolerance) -> None:
        """Note what misses its bound; a figure that is not a number misses it."""
        if not self.check_finite(name, found):
            return
        if not found.relative <= bound.relative:
            self.failures.append(
                f"{name} differ by {found.relative:.2e} (relative), bound {bound.relative:.0e}"
            )
        if not found.cosine >= bound.cosine:
            self.failures.append(
                f"{name} have cosine {found.cosine:.6f}, bound {bound.cosine}"
            )

    def check_finite(self, name: str, found: Distance) -> bool:
        """Whether figures are finite; note it where they are not."""
        finite = math.isfinite(found.relative)
        if not finite:
            self.failures.append(f"{name} are not finite, here or in PyTorch")
        return finite

    def check_tokens(self, kl: float, kl_mean: float, top1: float, bound: Tolerance) -> None:
        """Keep the decoder's figures on next tokens, and note what misses its bound."""
        self.kl, self.kl_mean, self.top1 = kl, kl_mean, top1
        if not kl <= bound.kl:
            self.failures.append(f"KL {kl:.2e} nats, bound {bound.kl:.0e}")
        if not kl_mean <= bound.kl_mean:
            self.failures.append(f"mean KL {kl_mean:.2e} nats, bound {bound.kl_mean:.0e}")
        if not top1 >= bound.top1:
            self.failures.append(f"top-1 agrees on {top1:.4f}, bound {bound.top1}")


@dataclass
class EndToEndParity:
    """Greedy answers of the runtime beside PyTorch's.

    Attributes:
        equal: answers with the same tokens, the one that ended them included.
        ties: answers that part where PyTorch itself is undecided (``Tolerance.tie``).
        known: samples whose true answer is known.
        accuracy, reference_accuracy: share of exact answers, None without known answers.
        differences: answers that differ, with what parts them; ``failures`` are those of them
            that miss a bound.
    """

    samples: int
    equal: int = 0
    ties: int = 0
    known: int = 0
    accuracy: float | None = None
    reference_accuracy: float | None = None
    by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class ParityReport:
    """All of it; ``passed`` when no bound was missed.

    Attributes:
        backend: what ran the bundle, of ``engines.backends.BACKENDS``.
    """

    backend: str
    graphs: list[GraphParity]
    end_to_end: EndToEndParity
    accuracy: AccuracyReport

    @property
    def failures(self) -> list[str]:
        """What missed its bound, with the graph in front."""
        parts = [f"{g.graph}: {text}" for g in self.graphs for text in g.failures]
        parts += [f"end to end: {text}" for text in self.end_to_end.failures]
        return parts + [f"accuracy: {text}" for text in self.accuracy.failures]

    @property
    def passed(self) -> bool:
        """Whether nothing missed its bound."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The comparison as a JSON object; ``accuracy`` has one of its own."""
        figures: dict[str, Any] = as_json(
            {
                "passed": self.passed,
                "failures": self.failures,
                "backend": self.backend,
                "graphs": [asdict(graph) for graph in self.graphs],
                "end_to_end": asdict(self.end_to_end),
            }
        )
        return figures
