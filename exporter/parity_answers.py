"""Answers of the runtime beside PyTorch's: equal, parted at a tie, or wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .parity_metrics import first_divergence
from .parity_report import EndToEndParity, Verdict
from .tolerances import Tolerance

LogitsAt = Callable[[int], npt.NDArray[Any]]
"""PyTorch's logits [V] that token n of its answer was chosen from."""


def judge_answer(
    found: Sequence[int],
    wanted: Sequence[int],
    finish_reason: str,
    logits_at: LogitsAt,
    tie: float,
) -> Verdict:
    """Compare two greedy answers of one limit, the ids that ended them included.

    Args:
        found: the runtime's ids.
        wanted: PyTorch's.
        finish_reason: why the runtime's ended.
        logits_at: asked for the first token that differs, if any.
        tie: logits closer than this count as undecided.
    """
    place = first_divergence(found, wanted)
    if place is None:
        return Verdict("equal")
    if place == len(found):
        # All of it agrees, so no stop id is among it: PyTorch would have ended there as well.
        return Verdict(
            "different",
            f"the answer ended after {len(found)} tokens without a stop id "
            f"({finish_reason!r}), PyTorch's goes on to {len(wanted)}",
        )
    if place == len(wanted):
        return Verdict(
            "different",
            f"the answer goes on to {len(found)} tokens, PyTorch's ended after {len(wanted)}",
        )
    logits = logits_at(place)
    margin = float(logits[wanted[place]]) - float(logits[found[place]])
    if margin < tie and np.isfinite(margin):
        return Verdict("tie", f"token {place} parts at a margin of {margin:.1e}")
    return Verdict(
        "different",
        f"token {place} is {found[place]}, PyTorch's {wanted[place]}, which it prefers by "
        f"{margin:.3f}",
    )


def record_verdict(
    parity: EndToEndParity, verdict: Verdict, label: str, bound: Tolerance
) -> None:
    """Count a verdict and list what differs, with the sample's name.

    It is a failure as well where the bound holds every answer to PyTorch's, and where the
    runtime gave none.
    """
    parity.equal += verdict.kind == "equal"
    parity.ties += verdict.kind == "tie"
    if verdict.kind not in ("different", "failed"):
        return
    text = f"{label}: {verdict.reason}"
    parity.differences.append(text)
    if bound.judges_each or verdict.kind == "failed":
        parity.failures.append(text)


def score_answers(parity: EndToEndParity) -> None:
    """Exact-answer accuracy of both sides, over all and by kind."""
    known = [item for item in parity.answers if item["truth"] is not None]
    parity.known = len(known)
    if not known:
        return

    def share(items: list[dict[str, Any]], key: str) -> float:
        right = [bool(item[key] == item["truth"].strip()) for item in items]
        return sum(right) / len(right)

    parity.accuracy = share(known, "answer")
    parity.reference_accuracy = share(known, "reference")
    for kind in sorted({item["kind"] for item in known if item["kind"]}):
        items = [item for item in known if item["kind"] == kind]
        parity.by_kind[kind] = {
            "samples": len(items),
            "accuracy": share(items, "answer"),
            "reference_accuracy": share(items, "reference"),
        }
