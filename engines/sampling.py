"""From logits to the next token id.

The steps, their order and their meaning are those of Hugging Face transformers' logits
processors (``generation/logits_process.py``): repetition penalty, temperature, top-k, top-p,
min-p. Probabilities are computed in float64 with the largest logit subtracted first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import EngineError, InputError

_Ids = npt.NDArray[np.intp]
_Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn and where it ends; the defaults are greedy.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach it; 1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest; 0 keeps all.
        repetition_penalty: above 1 makes tokens that were seen less likely; 1 does nothing.
        seed: of the random numbers; None draws a new one each time.
        stop: texts that end the answer and are no part of it.
        ignore_eos: go on after the model's own end, up to ``max_tokens`` (for benchmarks).
        draft_tokens: most tokens that a greedy step may look up in the text so far and check
            together with its own; 0 for none, None for as many as pay. See
            ``engines.prompt_lookup``.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1, "the most tokens to generate")
        _check_integer("top_k", self.top_k, 0, "the number of tokens to keep, 0 for all")
        if self.draft_tokens is not None:
            meaning = "the most tokens to look up, or None for as many as pay"
            _check_integer("draft_tokens", self.draft_tokens, 0, meaning)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, "or None for a new one each time")
        for name, holds, meaning in _NUMBERS:
            value = getattr(self, name)
            if not (_is_number(value) and holds(value)):
                raise InputError(f"{name} is {value!r}; give a number {meaning}.")
        object.__setattr__(self, "stop", _as_texts(self.stop))

    @property
    def is_greedy(self) -> bool:
        """True if the choice is that of the largest logit, as the decoder gave them."""
        return self.temperature == 0 and self.repetition_penalty == 1

    def override(self, **changes: Any) -> SamplingParams:
        """These settings with some of them replaced.

        Raises:
            InputError: a name is unknown, or a value cannot be used.
        """
        known = [field.name for field in fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise InputError(
                f"There is no sampling setting {', '.join(unknown)}; there are "
                f"{', '.join(known)}."
            )
        return replace(self, **changes)


def _check_integer(name: str, value: int, least: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(
            f"{name} is {value!r}; give a whole number of at least {least} ({meaning})."
        )


def _as_texts(stop: Sequence[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not (
        isinstance(texts, (list, tuple))
        and all(isinstance(text, str) and text for text in texts)
    ):
        raise InputError(
            f"stop is {stop!r}; give texts of at least one character each, or one such text."
        )
    return tuple(texts)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return math.isfinite(value)


_NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda value: value >= 0, "of 0 (greedy) or more"),
    ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1 (keep all)"),
    ("min_p", lambda value: 0 <= value <= 1, "from 0 (keep all) to 1"),
    ("repetition_penalty", lambda value: value > 0, "above 0; 1 does nothing"),
)


class Sampler:
    """Draws the ids of one answer; the same seed and logits give the same ids.

    Args:
        params: how.
        seen: ids of the prompt, which count as seen for the repetition penalty, as in
            transformers; image rows are no tokens and are to be left out.
    """

    def __init__(self, params: SamplingParams, seen: Iterable[int] = ()) -> None:
        self.params = params
        self._random = np.random.default_rng(params.seed)
        self._seen = set(seen) if params.repetition_penalty != 1 else set()

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """The next id, by greedy choice or by a draw, noted as seen.

        Args:
            logits: float32 [V], left as they are.

        Raises:
            EngineError: a logit is not finite.
        """
        if not np.isfinite(logits).all():
            bad = int(np.count_nonzero(~np.isfinite(logits)))
            raise EngineError(
                f"The decoder gave {bad} of {logits.size} logits that are not finite: its "
                "numbers overflowed. Run `mvlm parity` on the bundle, or compile it again "
                "with --recipe fp32."
            )
        if self.params.repetition_penalty != 1:
            logits = self._penalize(logits)
        id_ = int(logits.argmax()) if self.params.temperature == 0 else self._draw(logits)
        if self.params.repetition_penalty != 1:
            self._seen.add(id_)
        return id_

    def _penalize(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Divide positive and multiply negative logits of seen ids (Keskar et al. 2019)."""
        ids = np.fromiter(self._seen, np.intp, len(self._seen))
        penalty = np.float32(self.params.repetition_penalty)
        penalized: npt.NDArray[np.float32] = logits.copy()
        seen = logits[ids]
        penalized[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
        return penalized

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        ids, probabilities = filtered_probabilities(logits, self.params)
        cumulative = probabilities.cumsum()
        place = int(cumulative.searchsorted(self._random.random() * cumulative[-1], "right"))
        return int(ids[min(place, ids.size - 1)])


def filtered_probabilities(
    logits: npt.NDArray[np.float32], params: SamplingParams
) -> tuple[_Ids, _Scores]:
    """What is drawn from: ids in rising order and the probability of each, summing to 1.

    Args:
        logits: float32 [V], finite, after the repetition penalty.
        params: its temperature must be above 0.
    """
    with np.errstate(over="ignore"):  # a tiny temperature makes all but the best -inf
        scores = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    ids: _Ids = np.arange(scores.size)
    if 0 < params.top_k < scores.size:
        ids = np.flatnonzero(scores >= np.partition(scores, -params.top_k)[-params.top_k])
    if params.top_p < 1:
        ids = ids[_in_nucleus(_softmax(scores[ids]), params.top_p)]
    if params.min_p > 0:
        # The likeliest has score 0, so its probability is exp(0) of the others' unit.
        ids = ids[np.exp(scores[ids]) >= params.min_p]
    return ids, _softmax(scores[ids])


def _softmax(scores: _Scores) -> _Scores:
    """Probabilities of scores whose largest is 0."""
    weights = np.exp(scores)
    probabilities: _Scores = weights / weights.sum()
    return probabilities


def _in_nucleus(probabilities: _Scores, top_p: float) -> _Ids:
    """Rising places of the fewest likeliest entries that reach ``top_p`` (Holtzman 2020).

    Dropped, as in transformers: the least likely entries, as long as the sum of what is
    dropped stays at most 1 - top_p. Entries of at most (1 - top_p) / N each can be dropped
    without sorting, since N of them sum to no more than that: of a peaked distribution, nearly
    all.
    """
    budget = 1 - top_p
    places = np.flatnonzero(probabilities > budget / probabilities.size)
    likely = probabilities[places]
    order = likely.argsort(kind="stable")
    dropped = 1 - likely.sum() + likely[order].cumsum()
    dropped[-1] = math.inf  # the likeliest entry always stays
    kept: _Ids = np.sort(places[order[dropped > budget]])
    return kept
