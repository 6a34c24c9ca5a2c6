"""What quantization costs: the records of an accuracy report, and their JSON.

Over the tokens of the forced answers, p being PyTorch's distribution of a token and q the
runtime's, both in nats:

    KL          =  sum of p (log p - log q),  mean, 99th percentile and largest over tokens
    perplexity  =  exp(mean of -log q[token]),  over tokens of true answers

and of a layer's weight W that became Q, the signal-to-quantization-noise ratio in dB:

    SQNR  =  -20 log10(||W - Q|| / ||W||)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .parity_metrics import (
    binomial_tail,
    kl_divergence,
    negative_log_likelihood,
    top1_agreement,
)
from .tolerances import CHANCE, Tolerance

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LayerNoise:
    """One quantized weight.

    Attributes:
        form: what it is stored as, ``int4 g128``.
        sqnr_db: signal-to-quantization-noise ratio; infinite where nothing was lost.
    """

    graph: str
    layer: str
    form: str
    sqnr_db: float


@dataclass(frozen=True)
class TokenAccuracy:
    """Of forced answers, over their tokens.

    Attributes:
        tokens: how many, those that end an answer included.
        answers: how many; one a sample.
        true_answers: those of them that are true; the others are PyTorch's greedy ones.
        kl_mean, kl_p99, kl_max: nats.
        top1: share of tokens on whose best candidate both sides agree; where PyTorch itself is
            undecided (``Tolerance.tie``) they do.
        perplexity, reference_perplexity: of the true answers; None where none is known.
    """

    tokens: int
    answers: int
    true_answers: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    perplexity: float | None
    reference_perplexity: float | None


@dataclass(frozen=True)
class ExactAnswers:
    """Greedy answers beside the true ones.

    Attributes:
        samples: those whose true answer is known.
        accuracy, reference_accuracy: share that is exact, in the runtime and in PyTorch; None
            without samples.
        by_kind: the same by kind of question.
    """

    samples: int
    accuracy: float | None = None
    reference_accuracy: float | None = None
    by_kind: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Exact answers fewer than PyTorch's; below zero where there are more."""
        if self.accuracy is None or self.reference_accuracy is None:
            return 0
        return round((self.reference_accuracy - self.accuracy) * self.samples)


@dataclass(frozen=True)
class AccuracyReport:
    """All of it; ``passed`` when no bound was missed.

    Attributes:
        precision: of each graph, a key of ``tolerances.TOLERANCES``.
        weight_bytes: of each graph, by what they hold: ``int8`` and ``int4`` codes,
            ``scales``, ``float32``, ``float16``, and ``other`` constants.
        layers: quantized weights, in the graphs' order.
        failures: what missed its bound.
    """

    precision: Mapping[str, str]
    weight_bytes: Mapping[str, Mapping[str, int]]
    layers: Sequence[LayerNoise]
    tokens: TokenAccuracy
    answers: ExactAnswers
    failures: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether nothing missed its bound."""
        return not self.failures

    @property
    def is_quantized(self) -> bool:
        """Whether any graph holds integers."""
        return any(name.startswith("int") for name in self.precision.values())

    def worst_layers(self, count: int = 5) -> list[LayerNoise]:
        """Those that lost most, the worst first."""
        return sorted(self.layers, key=lambda layer: layer.sqnr_db)[:count]

    def to_json(self) -> dict[str, Any]:
        """A JSON object; figures that JSON has no number for become "inf", "-inf", "nan"."""
        report: dict[str, Any] = as_json({"passed": self.passed, **asdict(self)})
        return report


class ForcedScores:
    """Gathers the figures of forced answers, case by case.

    Args:
        tie: logits closer than this in PyTorch count as undecided.
    """

    def __init__(self, tie: float) -> None:
        self._tie = tie
        self._kl: list[float] = []
        self._agreeing = 0.0
        self._costs: list[float] = []
        self._reference_costs: list[float] = []
        self._answers = 0
        self._true_answers = 0

    def add(self, found: Array, reference: Array, ids: Sequence[int], known: bool) -> None:
        """Take one answer in.

        Args:
            found: the runtime's logits [A, V] that each token was judged by.
            reference: PyTorch's.
            ids: the answer's tokens [A].
            known: whether it is the true one.
        """
        self._answers += 1
        self._kl += kl_divergence(reference, found).tolist()
        self._agreeing += top1_agreement(reference, found, self._tie) * len(ids)
        if known:
            self._true_answers += 1
            self._costs += negative_log_likelihood(found, ids).tolist()
            self._reference_costs += negative_log_likelihood(reference, ids).tolist()

    def figures(self) -> TokenAccuracy:
        """Of all that was taken in, one answer at least."""
        kl = np.array(self._kl)
        return TokenAccuracy(
            tokens=len(kl),
            answers=self._answers,
            true_answers=self._true_answers,
            kl_mean=float(kl.mean()),
            kl_p99=_percentile(kl, 99),
            kl_max=float(kl.max()),
            top1=self._agreeing / len(kl),
            perplexity=_perplexity(self._costs),
            reference_perplexity=_perplexity(self._reference_costs),
        )


def find_failures(tokens: TokenAccuracy, answers: ExactAnswers, bound: Tolerance) -> list[str]:
    """What misses its bound, a sentence each.

    Fewer exact answers are a failure where a bundle that loses ``bound.drop`` of them on
    average would lose so many less often than ``CHANCE``: a few samples must not decide by
    luck. Where every answer is held to PyTorch's anyway, they are not judged again.
    """
    failures = []
    if not tokens.kl_mean <= bound.kl_mean:
        failures.append(
            f"mean KL {tokens.kl_mean:.2e} nats over {tokens.tokens} tokens of answers, bound "
            f"{bound.kl_mean:.0e}"
        )
    if not tokens.top1 >= bound.top1:
        failures.append(f"top-1 agrees on {tokens.top1:.4f}, bound {bound.top1}")
    if not bound.judges_each and _loses_beyond_chance(answers, bound.drop):
        failures.append(
            f"{answers.accuracy:.1%} of {answers.samples} answers are exact and "
            f"{answers.reference_accuracy:.1%} in PyTorch; {bound.drop:.0%} may be lost"
        )
    return failures


def _loses_beyond_chance(answers: ExactAnswers, drop: float) -> bool:
    return binomial_tail(answers.samples, answers.lost, drop) < CHANCE


def _perplexity(costs: list[float]) -> float | None:
    if not costs:
        return None
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(costs)))


def _percentile(values: Array, share: float) -> float:
    """As numpy's, which makes NaN of what lies between two infinities."""
    return float(np.percentile(values, share, method="higher"))


def as_json(value: Any) -> Any:  # noqa: ANN401
    """Plain values as they are, figures that JSON has no number for as text."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
