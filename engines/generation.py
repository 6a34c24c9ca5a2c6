"""From prompt ids to a streamed answer: prefill, decode one token at a time, stop.

Everything here is about one answer; what it runs on is a :class:`DecoderSession`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from .decoder_state import DecoderState, Digests, KeptRows
from .errors import InputError
from .image_encoder import ImageRows
from .prompt import PromptIds
from .prompt_lookup import GreedySteps
from .sampling import Sampler, SamplingParams
from .session import FloatArray
from .timings import PhaseClock, Timings
from .tokenizer import LlamaTokenizer, StreamDecoder

FinishReason = Literal["stop", "length", "stop_string", "context", "interrupted"]
"""Why an answer ended: the model said so; max_tokens; a stop string; no position was left; the
stream was closed or interrupted."""


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: without special tokens and without what a stop string ended.
        ids: every generated id, the one that ended the answer included.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "text": self.text,
            "ids": list(self.ids),
            "finish_reason": self.finish_reason,
            "timings": self.timings.to_json(),
        }


class StopScanner:
    """Passes text on up to the first stop string, and never a part of one.

    Text that may be the beginning of a stop string is held back until it is not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What is safe to show after ``text``; nothing more once ``stopped``."""
        if self.stopped:
            return ""
        text = self._held + text
        places = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops]
        found = [(end, start) for end, start in places if start >= 0]
        if found:  # the one that is complete first, so that it is the same by any tokens
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class TextModel:
    """What generation needs to know of the model."""

    tokenizer: LlamaTokenizer
    vocab_size: int
    stop_ids: frozenset[int]
    load_seconds: float


@dataclass(frozen=True)
class Request:
    """One question, checked and ready to run.

    Attributes:
        limit: tokens that may be generated, at least 1.
        limit_reason: the finish reason when they are used up.
        embed: makes the image rows [I, D], I >= 1, that ``prompt`` names.
        lease: lends a state for the prompt with these pictures; rows shared are reused.
        commit: called with the answer, before the state is given back.
        new_images: pictures that come with this question.
    """

    prompt: PromptIds
    params: SamplingParams
    limit: int
    limit_reason: FinishReason
    embed: Callable[[PhaseClock], ImageRows]
    lease: Callable[[PromptIds, Digests], AbstractContextManager[DecoderState]]
    commit: Callable[[Answer], None]
    new_images: int = 0


class AnswerStream(Iterator[str]):
    """Text deltas of an answer; at their end, ``answer`` holds the whole.

    The work begins with the first delta asked for. Closing it early (``close``, leaving a
    ``with`` block, dropping it, Ctrl-C) ends the answer there and leaves the model ready for
    the next.
    """

    def __init__(self, model: TextModel, request: Request) -> None:
        # Neither refers to the stream, so it is closed when its last reference goes.
        self._run = _Run(model, request)
        self._deltas = self._run.deltas()

    def __next__(self) -> str:
        return next(self._deltas)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the answer here, if it has not ended."""
        self._deltas.close()

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            InputError: the stream has not been read to its end, or gave no token.
        """
        if self._run.answer is None:
            raise InputError(
                "There is no answer yet: read the stream to its end, or close it after its "
                "first token."
            )
        return self._run.answer

    def read(self) -> Answer:
        """Read to the end."""
        for _ in self:
            pass
        return self.answer


class _Run:
    """The work of one answer and what it has come to so far."""

    def __init__(self, model: TextModel, request: Request) -> None:
        self._model = model
        self._request = request
        self._ids: list[int] = []
        self._text: list[str] = []
        self._reason: FinishReason = "interrupted"
        self._first_token_at = 0.0
        self._greedy: GreedySteps | None = None
        self.answer: Answer | None = None

    def deltas(self) -> Generator[str, None, None]:
        """Do the work, text by text."""
        clock, request = PhaseClock(), self._request
        images = request.embed(clock)
        with request.lease(request.prompt, images.digests) as state:
            kept = state.rewind(request.prompt, images.digests)
            try:
                yield from self._deltas_of(state, images.embeds, clock)
                self._complete(clock, kept, images)
            except (GeneratorExit, KeyboardInterrupt):
                if self._ids:
                    self._complete(clock, kept, images)
                else:
                    state.drop_interrupted(kept.count)
                raise
            except BaseException:
                state.start_anew()
                raise

    def _deltas_of(
        self, state: DecoderState, image_embeds: FloatArray, clock: PhaseClock
    ) -> Generator[str, None, None]:
        model, request = self._model, self._request
        prompt_ids = request.prompt.ids
        sampler = Sampler(request.params, prompt_ids[prompt_ids < model.vocab_size].tolist())
        scanner = StopScanner(request.params.stop)
        text_decoder = StreamDecoder(model.tokenizer)
        with clock.phase("prefill"):
            id_ = sampler.choose(state.prefill(request.prompt, image_embeds))
            if request.params.is_greedy and state.chooses_greedily:
                seen = [*prompt_ids.tolist(), id_]
                most = request.params.draft_tokens
                self._greedy = GreedySteps(state, seen, image_embeds, model.vocab_size, most)
        self._first_token_at = clock.elapsed()
        while True:
            self._ids.append(id_)
            is_stop = id_ in model.stop_ids and not request.params.ignore_eos
            delta = "" if is_stop else scanner.feed(text_decoder.feed(id_))
            ends = is_stop or scanner.stopped or len(self._ids) == request.limit
            if ends:
                delta += scanner.feed(text_decoder.finish()) + scanner.finish()
                self._reason = "stop" if is_stop else request.limit_reason
                self._reason = "stop_string" if scanner.stopped else self._reason
            if delta:
                self._text.append(delta)
                with clock.pause():
                    yield delta
            if ends:
                return
            with clock.phase("decode"):
                if self._greedy is not None:
                    id_ = self._greedy.next_id(request.limit - len(self._ids))
                else:
                    id_ = sampler.choose(state.decode_one_token(id_, image_embeds))

    def _complete(self, clock: PhaseClock, kept: KeptRows, images: ImageRows) -> None:
        timings = Timings(
            load=self._model.load_seconds,
            **clock.seconds,
            time_to_first_token=self._first_token_at,
            total=clock.elapsed(),
            prefill_tokens=len(self._request.prompt) - kept.count,
            cached_tokens=kept.count,
            prefix_tokens=kept.from_prefix,
            decode_tokens=len(self._ids) - 1,
            guessed_tokens=self._greedy.guessed if self._greedy is not None else 0,
            kept_guesses=self._greedy.kept if self._greedy is not None else 0,
            images=self._request.new_images,
            images_reused=images.reused,
        )
        text = "".join(self._text)
        self.answer = Answer(text, tuple(self._ids), self._reason, timings)
        self._request.commit(self.answer)
