"""How fast a bundle answers: the medians of several runs of one question.

The protocol ``paper`` is that of MobileVLM's papers: one image, one question and 256 new
tokens, the model's own end ignored. ``tokens_per_second`` is the new tokens over the total,
image and prompt included; ``decode_tokens_per_second`` is what most other figures mean.
``decode`` leaves the image out and asks for 128 tokens, as llama.cpp's ``llama-bench`` does by
default: the decoder by itself, with a short cache. Every run pays in full: no image rows and
no cache rows are kept from the run before, except the prompt prefix that the bundle ships.

A decode step reads the decoder's weights (of the embedding one row) and the filled cache once:

    GB/s reached = (weights + cache row * mean length) * decode tokens/s / 1e9
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import EngineError, InputError
from .kv_cache import CacheShape
from .load_image import ImageSource
from .sampling import SamplingParams
from .targets import get_target
from .timings import Timings
from .vlm import VLM


@dataclass(frozen=True)
class Protocol:
    """What is asked of a bundle.

    Attributes:
        with_image: whether the question is about one.
        new_tokens: of each answer, unless another number is asked for.
    """

    with_image: bool
    new_tokens: int


PROTOCOLS: Mapping[str, Protocol] = {
    "paper": Protocol(with_image=True, new_tokens=256),
    "decode": Protocol(with_image=False, new_tokens=128),
}
"""By name; ``paper`` is that of arXiv 2402.03766, section 4."""

SECONDS = ("preprocess", "vision", "projector", "prefill", "time_to_first_token", "total")

Progress = Callable[[int, int, str], None]
"""Called with (runs done, runs in all, what runs)."""


@dataclass(frozen=True)
class Spread:
    """Of several runs.

    Attributes:
        median: with an even number of runs the mean of the middle two.
        low, high: the extremes.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one figure, a value for each run."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Attributes:
        protocol: a key of ``PROTOCOLS``.
        new_tokens: of each run.
        prompt_tokens: rows of the prompt, image rows included.
        cached_tokens: those of them that the shipped prefix covers.
        runs: how many were measured, warm-up left out.
        load: seconds to open the bundle, once.
        seconds: of each phase; keys of ``SECONDS``.
        decode_tokens_per_second: of the tokens behind the first.
        tokens_per_second: new tokens over the total.
        bytes_per_token: that a decode step reads, at the mean length; None where the bundle
            does not say what its weights take.
        gigabytes_per_second: reached by the median of the decode speed; None likewise.
        bandwidth: of the target's memory in GB/s; None where it varies.
        ids: the new tokens, the same in every run.
    """

    protocol: str
    new_tokens: int
    prompt_tokens: int
    cached_tokens: int
    runs: int
    load: float
    seconds: Mapping[str, Spread]
    decode_tokens_per_second: Spread
    tokens_per_second: Spread
    bytes_per_token: int | None
    gigabytes_per_second: float | None
    bandwidth: float | None
    ids: tuple[int, ...]

    @property
    def share_of_bandwidth(self) -> float | None:
        """Of the target's memory; says nothing on another machine."""
        if self.gigabytes_per_second is None or self.bandwidth is None:
            return None
        return self.gigabytes_per_second / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "ids": list(self.ids),
            "share_of_bandwidth": self.share_of_bandwidth,
        }


def bench(
    vlm: VLM,
    image: ImageSource | None,
    question: str,
    new_tokens: int | None = None,
    runs: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
    protocol: str = "paper",
) -> BenchReport:
    """Ask one question several times over.

    Args:
        vlm: opened with ``reuse=False``, so that each run pays in full.
        image: None where the protocol has none.
        new_tokens: tokens of each answer, the first included; at least 2. None for the
            protocol's.
        runs: that are measured.
        warmup: that are not, before them.
        protocol: a key of ``PROTOCOLS``.

    Raises:
        InputError: the prompt leaves fewer positions, a count is too small, or the protocol
            is not known or has no image where one is given, or the other way round.
        EngineError: a graph failed, or two runs answered differently.
    """
    asked = _find_protocol(protocol, image is not None)
    new_tokens = asked.new_tokens if new_tokens is None else new_tokens
    _check_counts(new_tokens, runs, warmup)
    images = [] if image is None else [image]
    length = len(vlm.tokenize(vlm.conversation().ask(question, len(images))))
    room = vlm.model.max_positions - length
    if room < new_tokens:
        raise InputError(
            f"The prompt takes {length} of {vlm.model.max_positions} positions and leaves "
            f"{max(room, 0)}, fewer than {new_tokens} new tokens. Give a smaller --tokens, or "
            "compile with a larger --max-length."
        )
    # The papers' figures are of one token a step, and so are those of the bus.
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, draft_tokens=0)
    found: list[Timings] = []
    ids: tuple[int, ...] = ()
    for index in range(warmup + runs):
        if progress is not None:
            progress(index, warmup + runs, "warm-up" if index < warmup else "answer")
        answer = vlm.generate(images, question, params)
        ids = ids or answer.ids
        if answer.ids != ids:
            raise _changed(index, ids, answer.ids)
        if index >= warmup:
            found.append(answer.timings)
    if progress is not None:
        progress(warmup + runs, warmup + runs, "answer")
    return _report(vlm, protocol, found, length, ids)


def _find_protocol(name: str, has_image: bool) -> Protocol:
    found = PROTOCOLS.get(name)
    if found is None:
        raise InputError(
            f"There is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}."
        )
    if found.with_image and not has_image:
        raise InputError(
            f"The protocol {name!r} asks about an image, but none was given; give one, or "
            "choose the protocol 'decode'."
        )
    if has_image and not found.with_image:
        raise InputError(
            f"The protocol {name!r} has no image, but one was given; leave it out, or choose "
            "the protocol 'paper'."
        )
    return found


def _check_counts(new_tokens: int, runs: int, warmup: int) -> None:
    if new_tokens < 2 or runs < 1 or warmup < 0:
        raise InputError(
            f"{new_tokens} tokens, {runs} runs and {warmup} warm-ups measure nothing: give 2 "
            "tokens, 1 run and 0 warm-ups at least."
        )


def _changed(run: int, ids: Sequence[int], other: Sequence[int]) -> EngineError:
    place = next(i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b)
    return EngineError(
        f"Run {run + 1} answered otherwise than the first from token {place + 1} on, though "
        "both chose the likeliest token. Its timings would not be comparable; run "
        "`mvlm parity` on the bundle."
    )


def _report(
    vlm: VLM,
    protocol: str,
    found: Sequence[Timings],
    prompt_tokens: int,
    ids: tuple[int, ...],
) -> BenchReport:
    bundle = vlm.bundle
    decode = Spread.of([timings.decode_tokens_per_second for timings in found])
    read = bytes_per_token(bundle, prompt_tokens + len(ids) / 2)
    reached = None if read is None else read * decode.median / 1e9
    target = get_target(bundle.manifest.target, bundle.manifest.jetpack)
    return BenchReport(
        protocol=protocol,
        new_tokens=len(ids),
        prompt_tokens=prompt_tokens,
        cached_tokens=found[0].cached_tokens,
        runs=len(found),
        load=found[0].load,
        seconds={name: Spread.of([getattr(t, name) for t in found]) for name in SECONDS},
        decode_tokens_per_second=decode,
        tokens_per_second=Spread.of([len(ids) / timings.total for timings in found]),
        bytes_per_token=read,
        gigabytes_per_second=reached,
        bandwidth=target.bandwidth_gb_s,
        ids=ids,
    )


def bytes_per_token(bundle: Bundle, length: float) -> int | None:
    """What a decode step reads when the cache holds ``length`` rows.

    Returns:
        None where the manifest does not say what the decoder's weights take.
    """
    manifest = bundle.manifest
    weights = manifest.checks.get("estimate", {}).get("read_weights")
    if weights is None:
        return None
    model = manifest.model
    row = CacheShape(
        model.num_layers,
        model.num_key_value_heads,
        model.head_dim,
        1,
        np.dtype(manifest.cache_dtype).name,
    ).total_bytes
    return int(weights) + int(row * length)
