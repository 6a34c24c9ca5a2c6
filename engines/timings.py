"""Seconds and counts of one answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass

PHASES = ("preprocess", "vision", "projector", "prefill", "decode")


@dataclass(frozen=True)
class Timings:
    """Seconds and counts of one answer; time that the reader of a stream took is left out.

    Attributes:
        load: opening the bundle, once for all answers.
        preprocess: reading, padding, resizing and normalising the images.
        vision: the vision encoder, all images.
        projector: the projector, all images.
        prefill: the decoder over the prompt, and the choice of the first token.
        time_to_first_token: from the start of the work to the first token.
        decode: all tokens after the first.
        total: from the start of the work to its end, without ``load``.
        prefill_tokens: rows that prefill ran, image rows included.
        cached_tokens: rows of the prompt that the cache held already.
        prefix_tokens: those of them that the bundle's prompt prefix covers.
        decode_tokens: tokens after the first.
        images: pictures given with this question.
        images_reused: those of them whose image rows were kept from an earlier question, so
            that vision encoder and projector did not run for them.
        guessed_tokens: that were looked up in the text so far and run together with a token.
        kept_guesses: those of them that were right and are in the answer; they are among
            ``decode_tokens``.
    """

    load: float
    preprocess: float
    vision: float
    projector: float
    prefill: float
    time_to_first_token: float
    decode: float
    total: float
    prefill_tokens: int
    cached_tokens: int
    prefix_tokens: int
    decode_tokens: int
    images: int
    images_reused: int
    guessed_tokens: int = 0
    kept_guesses: int = 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token; 0 where there is only one."""
        return self.decode_tokens / self.decode if self.decode_tokens else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Rows that prefill ran a second."""
        return self.prefill_tokens / self.prefill

    def to_json(self) -> dict[str, float | int]:
        """Every figure by name, the speeds included."""
        return {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }


class PhaseClock:
    """Seconds by phase, from its making on; pauses count nowhere."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the start, pauses left out."""
        return time.perf_counter() - self._start

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = self.elapsed()
        yield
        self.seconds[name] += self.elapsed() - start

    def pause(self) -> AbstractContextManager[None]:
        """Leave the time of the block out."""
        return _Pause(self)

    def leave_out(self, seconds: float) -> None:
        """Count so much less."""
        self._start += seconds


class _Pause(AbstractContextManager[None]):
    """Time that a clock leaves out.

    A class, as a stream may be dropped within the block: on Python 3.10 an exception that
    passes a ``contextlib.contextmanager`` is in a cycle with its frames, and what they hold,
    the cache among it, stays until the garbage collector comes by.
    """

    def __init__(self, clock: PhaseClock) -> None:
        self._clock = clock
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._clock.leave_out(time.perf_counter() - self._start)
