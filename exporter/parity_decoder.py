"""The decoder, teacher-forced: logits of every row, and the new cache rows of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.errors import EngineError

from .parity_metrics import Distance, distance, kl_divergence, top1_agreement
from .parity_session import ForcedDecoder
from .reference import ForcedRun, Step

Array = npt.NDArray[Any]


def measure(graph: str, found: Array, wanted: Array) -> Distance:
    """Distance of a graph's output from PyTorch's.

    Raises:
        EngineError: it has another shape.
    """
    _require_shape(graph, found, wanted)
    return distance(found, wanted)


def _require_shape(graph: str, found: Array, wanted: Array) -> None:
    if found.shape != wanted.shape:
        raise EngineError(
            f"The graph {graph!r} gives a tensor of shape {list(found.shape)} where PyTorch "
            f"gives {list(wanted.shape)}: they are not of one model. Compile the bundle "
            "again, or name the checkpoint it was made from."
        )


@dataclass
class TokenFigures:
    """Worst figures over decoder calls; see :mod:`.parity_metrics` for each.

    Attributes:
        tie: logits closer than this in PyTorch count as undecided.
        answer_rows: look at the logits of each call's last row alone, which give the answer.
        kl: worst row, in nats.
        answer_kl: of each call's last row.
        agreements: top-1 agreement of each row, 0 to 1.
    """

    tie: float
    answer_rows: bool = False
    logits: Distance = field(default_factory=Distance)
    cache: Distance = field(default_factory=Distance)
    kl: float = 0.0
    answer_kl: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    @property
    def kl_mean(self) -> float:
        """Nats, over the rows that give an answer."""
        return float(np.mean(self.answer_kl))

    @property
    def top1(self) -> float:
        """Share of rows that agree."""
        return float(np.mean(self.agreements))

    def add(self, found: Step, wanted: Step) -> None:
        """Take one call in.

        Raises:
            EngineError: shapes differ.
        """
        _require_shape("decoder", found.logits, wanted.logits)
        kept = slice(-1, None) if self.answer_rows else slice(None)
        logits, reference = found.logits[kept], wanted.logits[kept]
        for row, expected in zip(logits, reference, strict=True):
            self.logits = self.logits.worst(distance(row, expected))
        for row, expected in zip(found.rows, wanted.rows, strict=True):
            self.cache = self.cache.worst(measure("decoder", row, expected))
        kl = kl_divergence(reference, logits)
        self.kl = float(np.maximum(self.kl, kl.max()))
        self.answer_kl.append(float(kl[-1]))
        agreement = top1_agreement(reference, logits, self.tie)
        self.agreements += [agreement] * len(reference)


def forced_steps(
    decoder: ForcedDecoder,
    prompt: Array,
    embeds: Array,
    answer: list[int],
    run: ForcedRun,
) -> Iterator[tuple[Step, Step]]:
    """(found, expected) of the prefill and of each one-token step, one after another.

    The graph's own cache rows are its past, so an error may build up as it would in use.

    Raises:
        EngineError: the graph failed, or takes or gives other tensors.
    """
    decoder.begin(embeds)
    calls = [prompt, *(np.array([token], np.int32) for token in answer[: len(run.decode)])]
    for ids, expected in zip(calls, [run.prefill, *run.decode], strict=True):
        found = decoder.step(ids)
        if len(found.rows) != len(expected.rows):
            raise EngineError(
                f"The graph 'decoder' has {len(found.rows)} cache tensors where PyTorch has "
                f"{len(expected.rows)}: they are not of one model. Compile the bundle again, "
                "or name the checkpoint it was made from."
            )
        if len(found.logits) < len(ids):  # what runs it gives the last rows alone
            expected = replace(expected, logits=expected.logits[-len(found.logits) :])
        yield found, expected
