"""What was measured, and what follows from it: medians, ratios, totals, share of bandwidth.

A ratio is taken in each round, between runs minutes apart, and the median of those is told: a
drift of the machine over an hour falls out of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from worker_protocol import PROMPT


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, with the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where nothing was measured."""
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known)) if known else None


@dataclass(frozen=True)
class Run:
    """One engine in one round; seconds, bytes and GB/s. None where it has no such part.

    Attributes:
        encode: of the vision encoder, with the projector where ``project`` is None.
        decode: of ``steps`` tokens behind the first.
        whole: of the engine's own path from picture to last token.
        bandwidth: that was read just before, in GB/s.
    """

    round: int
    engine: str
    load: float
    peak_rss: int
    bandwidth: float
    tokens: int | None = None
    steps: int | None = None
    encode: float | None = None
    project: float | None = None
    prefill: float | None = None
    decode: float | None = None
    total: float | None = None
    whole: float | None = None

    @property
    def seeing(self) -> float | None:
        """Seconds from picture to image rows."""
        return None if self.encode is None else self.encode + (self.project or 0.0)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the tokens behind the first."""
        if self.decode is None or not self.steps:
            return None
        return self.steps / self.decode


@dataclass(frozen=True)
class Subject:
    """An engine as measured: what does not change from round to round.

    Attributes:
        encoder: the engine whose encoder completes its total.
        weights_read: bytes of weights that each decode step reads.
        kv_row_bytes: bytes of a cached token, read each step.
        cosine: of image rows and logits with the reference's.
    """

    name: str
    title: str
    file_bytes: int
    encoder: str | None = None
    weights_read: float | None = None
    kv_row_bytes: float | None = None
    cosine: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Figures:
    """One row of the table."""

    subject: Subject
    rounds: int
    tokens: int | None
    encode: Spread | None
    project: Spread | None
    prefill: Spread | None
    tokens_per_second: Spread | None
    total: Spread | None
    whole: Spread | None
    load: Spread | None
    peak_rss: Spread | None
    share_of_bandwidth: Spread | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def gigabytes_per_second(run: Run, subject: Subject) -> float | None:
    """What the decode steps read a second: weights, and the cache at its mean length."""
    speed = run.tokens_per_second
    if speed is None or subject.weights_read is None or run.steps is None:
        return None
    cache = (subject.kv_row_bytes or 0.0) * (PROMPT + run.steps / 2)
    return (subject.weights_read + cache) * speed / 1e9


class Results:
    """All runs of a comparison.

    Args:
        tokens: of an answer; totals are told for answers of this length alone.
    """

    def __init__(self, subjects: Sequence[Subject], runs: Sequence[Run], tokens: int) -> None:
        self.subjects = {subject.name: subject for subject in subjects}
        self._tokens = tokens
        self._runs = {(run.engine, run.round): run for run in runs}

    def runs_of(self, name: str) -> list[Run]:
        """An engine's runs by round."""
        return [run for (engine, _), run in sorted(self._runs.items()) if engine == name]

    def total(self, run: Run) -> float | None:
        """Picture, prompt and answer; the encoder's part by its partner in the same round.

        None where the engine has no decoder, its answers are shorter, or its partner did not
        run in that round.
        """
        if run.tokens != self._tokens:
            return None
        if run.encode is not None:
            return run.total
        partner = self._runs.get((self.subjects[run.engine].encoder or "", run.round))
        if partner is None or partner.seeing is None or run.total is None:
            return None
        return run.total + partner.seeing

    def figures(self, name: str) -> Figures:
        """An engine's row."""
        subject, runs = self.subjects[name], self.runs_of(name)

        def share(run: Run) -> float | None:
            reached = gigabytes_per_second(run, subject)
            return None if reached is None else reached / run.bandwidth

        return Figures(
            subject=subject,
            rounds=len(runs),
            tokens=runs[0].tokens if runs else None,
            encode=Spread.of(run.encode for run in runs),
            project=Spread.of(run.project for run in runs),
            prefill=Spread.of(run.prefill for run in runs),
            tokens_per_second=Spread.of(run.tokens_per_second for run in runs),
            total=Spread.of(self.total(run) for run in runs),
            whole=Spread.of(run.whole for run in runs),
            load=Spread.of(run.load for run in runs),
            peak_rss=Spread.of(float(run.peak_rss) for run in runs),
            share_of_bandwidth=Spread.of(share(run) for run in runs),
        )

    def all_figures(self) -> list[Figures]:
        """Rows of all engines that ran."""
        return [self.figures(name) for name in self.subjects if self.runs_of(name)]

    def ratio(self, name: str, other: str, measure: str) -> Spread | None:
        """How many times faster ``name`` is than ``other``, by rounds that both ran.

        Args:
            measure: a key of ``MEASURES``.
        """
        value, more_is_better = MEASURES[measure]
        ratios = []
        for run in self.runs_of(name):
            rival = self._runs.get((other, run.round))
            ours, theirs = value(self, run), value(self, rival) if rival else None
            if ours is not None and theirs is not None:
                ratios.append(ours / theirs if more_is_better else theirs / ours)
        return Spread.of(ratios)

    def bandwidth(self) -> Spread | None:
        """GB/s read, over all runs."""
        return Spread.of(run.bandwidth for run in self._runs.values())


MEASURES: Mapping[str, tuple[Callable[[Results, Run], float | None], bool]] = {
    "encode + project": (lambda results, run: run.seeing, False),
    "prefill": (lambda results, run: run.prefill, False),
    "decode": (lambda results, run: run.tokens_per_second, True),
    "total": (lambda results, run: results.total(run), False),
}
"""How a measure is read from a run, and whether more of it is better."""
