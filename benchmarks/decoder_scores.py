"""How well a decoder continues texts, and how far its logits are from those of another.

Perplexity is what people know; the divergence from the float model's own distribution tells
methods apart that perplexity, on a few thousand tokens, does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx_sessions import open_session

from mvlm_export.engines.errors import InputError

Ids = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Distance:
    """Two models' logits on the same windows.

    Attributes:
        divergence: mean Kullback-Leibler divergence from the reference, in nats a token.
        agreement: share of rows whose likeliest token is the reference's.
        largest: greatest absolute difference of a logit.
        relative: ``||difference|| / ||reference's logits||``.
    """

    divergence: float
    agreement: float
    largest: float
    relative: float


@dataclass(frozen=True)
class Score:
    """How well a decoder continues texts.

    Attributes:
        perplexity: exp of the mean loss over all predicted tokens.
        losses: mean loss of each window, in nats a token.
        distance: from the reference, if there was one.
    """

    perplexity: float
    losses: tuple[float, ...]
    distance: Distance | None = None


def decoder_feeds(session: Any, ids: Ids) -> dict[str, Any]:  # noqa: ANN401
    """What a decoder with an empty cache takes for ids [S].

    Raises:
        InputError: it is no decoder whose cache grows (the append form).
    """
    feeds: dict[str, Any] = {}
    for spec in session.get_inputs():
        dtype = np.float16 if spec.type == "tensor(float16)" else np.float32
        if spec.name == "input_ids":
            feeds[spec.name] = ids.astype(np.int32)
        elif spec.name == "image_embeds":
            feeds[spec.name] = np.zeros((1, spec.shape[1]), dtype)
        elif spec.name.startswith("past_key_values.") and isinstance(spec.shape[0], str):
            feeds[spec.name] = np.zeros((0, *spec.shape[1:]), dtype)
        else:
            raise InputError(
                f"The decoder has an input {spec.name!r} {spec.shape}: compile it with the "
                "append form of the cache."
            )
    return feeds


def window_logits(
    model: Any,  # noqa: ANN401
    windows: Ids,
    threads: int | None = None,
) -> Iterator[FloatArray]:
    """Logits float32 [512, V] of each window.

    Args:
        model: path of ``model.onnx``, or an open session.
        windows: ids int32 [n, 512].
        threads: of ONNX Runtime.

    Raises:
        InputError: the graph gives the logits of the last row alone.
    """
    session = open_session(model, threads)
    for ids in windows:
        (logits,) = session.run(["logits"], decoder_feeds(session, ids))
        if len(logits) != len(ids):
            raise InputError(
                f"The decoder gives {len(logits)} rows of logits for {len(ids)} tokens. "
                "Compile it with --disable-pass keep-last-row."
            )
        yield logits.astype(np.float32)


def score_logits(
    logits: Iterable[FloatArray], windows: Ids, reference: Iterable[FloatArray] | None = None
) -> Score:
    """Score a model by its logits [512, V] for each window.

    Args:
        logits: of the model.
        windows: ids int32 [n, 512]; the first of each is not predicted.
        reference: logits of another model; None compares with nothing.
    """
    losses, gaps = [], _Gaps()
    others = iter(reference) if reference is not None else None
    for ids, ours in zip(windows, logits, strict=True):
        guesses = log_probabilities(ours)
        losses.append(-guesses[np.arange(len(ids) - 1), ids[1:]].mean(dtype=np.float64))
        if others is not None:
            gaps.add(ours, guesses, next(others))
    distance = None if others is None else gaps.distance()
    return Score(float(np.exp(np.mean(losses))), tuple(map(float, losses)), distance)


def score(
    model: Any,  # noqa: ANN401
    windows: Ids,
    reference: Any = None,  # noqa: ANN401
    threads: int | None = None,
) -> Score:
    """Score an ONNX decoder, and compare it with another that sees the same windows.

    Args:
        model: path of ``model.onnx``, or an open session.
        windows: ids int32 [n, 512]; the first of each is not predicted.
        reference: path or session of the float decoder; None compares with nothing.
        threads: of ONNX Runtime.

    Raises:
        EngineError: ONNX Runtime cannot load or run a graph.
        InputError: the graph has no logits for every row, or not the append form of the cache.
    """
    others = None if reference is None else window_logits(reference, windows, threads)
    return score_logits(window_logits(model, windows, threads), windows, others)


def perplexity(model: Any, windows: Ids, threads: int | None = None) -> float:  # noqa: ANN401
    """exp of the mean loss over all predicted tokens; see :func:`score`."""
    return score(model, windows, threads=threads).perplexity


def log_probabilities(logits: FloatArray) -> FloatArray:
    """Logarithm of the softmax along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@dataclass
class _Gaps:
    """Sums over windows of the differences from a reference."""

    divergences: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    largest: float = 0.0
    squares: float = 0.0
    norm: float = 0.0

    def add(self, ours: FloatArray, guesses: FloatArray, theirs: FloatArray) -> None:
        wanted = log_probabilities(theirs)
        rows = np.einsum("rv,rv->r", np.exp(wanted), wanted - guesses)
        self.divergences.append(float(rows.mean(dtype=np.float64)))
        self.agreements.append(float(np.mean(theirs.argmax(-1) == ours.argmax(-1))))
        gap = ours - theirs
        self.largest = max(self.largest, float(np.abs(gap).max()))
        self.squares += float(np.square(gap).sum(dtype=np.float64))
        self.norm += float(np.square(theirs).sum(dtype=np.float64))

    def distance(self) -> Distance:
        return Distance(
            float(np.mean(self.divergences)),
            float(np.mean(self.agreements)),
            self.largest,
            (self.squares / self.norm) ** 0.5,
        )
