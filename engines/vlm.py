"""The runtime: pictures and a question to a streamed answer.

``VLM.load("bundle").generate("kitchen.jpg", "What is on the table?").text``
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from .backends import open_backend
from .bundle import Bundle
from .errors import EngineError, InputError
from .generation import (
    Answer,
    AnswerStream,
    DecoderState,
    FinishReason,
    PhaseClock,
    Request,
    TextModel,
)
from .image_processor import ImageProcessorConfig, preprocess
from .load_image import ImageSource
from .prompt import Conversation, PromptIds, get_template, tokenize_prompt
from .sampling import SamplingParams
from .session import Backend, BackendOptions, FloatArray
from .targets import get_target
from .tokenizer import LlamaTokenizer

Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
"""No picture, one (all that ``load_image`` takes), or a list or tuple of them."""


class VLM:
    """A bundle, opened and ready to answer; made by :meth:`load`.

    Answers of one ``VLM`` may be streamed side by side: each has a cache of its own, which
    goes back to a pool at its end.
    """

    def __init__(self, bundle: Bundle, backend: Backend, started: float | None = None) -> None:
        """From what is open already; ``started``: ``time.perf_counter()`` when that began."""
        started = time.perf_counter() if started is None else started
        self.bundle = bundle
        self.model = model = bundle.manifest.model
        self._image_config = ImageProcessorConfig.from_json(model.image_processor)
        self._template = get_template(model.template)
        tokenizer = LlamaTokenizer.from_folder(bundle.tokenizer_path)
        self._vision = backend.open_graph("vision_encoder")
        self._projector = backend.open_graph("projector")
        self._decoder = backend.open_decoder()
        self._free: list[DecoderState] = []
        seconds = time.perf_counter() - started
        stop_ids = frozenset(model.stop_ids)
        self.text_model = TextModel(tokenizer, model.vocab_size, stop_ids, seconds)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "onnxruntime",
        provider: str | None = None,
        threads: int | None = None,
        verify: bool = True,
    ) -> VLM:
        """Open a bundle.

        Args:
            path: the bundle's folder.
            backend: a key of ``engines.backends.BACKENDS``.
            provider: the device kind, in the backend's terms; ``cpu`` or ``cuda``. None takes
                what the bundle's target runs on, the CPU for a target with engines.
            threads: CPU threads for one operator; None means the backend's default.
            verify: compare every file with its hash first (reads the whole bundle).

        Raises:
            BundleError: the bundle is missing or damaged.
            InputError: there is no such backend or provider.
            MissingPackageError: the backend's package is not installed.
            EngineError: the graphs cannot run here.
        """
        started = time.perf_counter()
        bundle = Bundle.load(path, verify)
        if provider is None:
            manifest = bundle.manifest
            provider = get_target(manifest.target, manifest.jetpack).provider
        options = BackendOptions(provider, threads)
        return cls(bundle, open_backend(bundle, backend, options), started)

    def generate(
        self,
        images: Images,
        question: str,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Answer:
        """Answer one question.

        Args:
            images: none, one or several; ``<image>`` in the question says where each stands,
                without it they stand in front.
            question: the user's words.
            params: how to sample; greedy without.
            overrides: fields of ``SamplingParams`` to replace, such as ``max_tokens=32``.

        Raises:
            InputError: an image, the question or a setting cannot be used, or the prompt
                leaves no position for the answer.
            EngineError: a graph failed, or its numbers are not finite.
        """
        return self.stream(images, question, params, **overrides).read()

    def stream(
        self,
        images: Images,
        question: str,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> AnswerStream:
        """As :meth:`generate`, text by text; the whole is in ``answer`` at the end."""
        sources = as_list(images)
        prompt = self.tokenize(self.conversation().ask(question, len(sources)))

        def embed(clock: PhaseClock) -> FloatArray:
            return self.embed_images(sources, clock) if sources else self.no_image()

        return AnswerStream(
            self.text_model,
            Request(
                prompt,
                *self.plan(prompt, params, overrides),
                embed=embed,
                lease=self._lease_state,
                commit=_forget,
            ),
        )

    def chat(self) -> ChatSession:
        """A conversation that remembers, with a cache of its own."""
        return ChatSession(self)

    def conversation(self) -> Conversation:
        """An empty conversation in the model's template."""
        return Conversation(self._template)

    def tokenize(self, conversation: Conversation) -> PromptIds:
        """Ids of a conversation, image rows included."""
        counts = [self.model.image_tokens] * conversation.image_count
        return tokenize_prompt(
            conversation.render(), self.text_model.tokenizer, self.model.vocab_size, counts
        )

    def embed_images(
        self, sources: Sequence[ImageSource], clock: PhaseClock | None = None
    ) -> FloatArray:
        """Rows [images * image_tokens, D] of pictures, one after another.

        Raises:
            InputError: a picture cannot be read.
            EngineError: a graph failed, or gave another number of rows than the manifest says.
        """
        clock = clock or PhaseClock()
        rows: list[FloatArray] = []
        for source in sources:
            with clock.phase("preprocess"):
                pixels = preprocess(source, self._image_config)
            with clock.phase("vision"):
                features = self._vision.run(pixels)
            with clock.phase("projector"):
                embeds = self._projector.run(features)[0]
            if len(embeds) != self.model.image_tokens:
                raise EngineError(
                    f"The projector gave {len(embeds)} rows for an image, but the manifest "
                    f"says {self.model.image_tokens}; compile the bundle again."
                )
            rows.append(embeds)
        return np.concatenate(rows)

    def no_image(self) -> FloatArray:
        """One row of zeros: what the decoder takes where there is no image."""
        return np.zeros((1, self.model.hidden_size), np.float32)

    def new_state(self) -> DecoderState:
        """An empty cache with its ids."""
        return DecoderState(self._decoder)

    def plan(
        self, prompt: PromptIds, params: SamplingParams | None, overrides: dict[str, Any]
    ) -> tuple[SamplingParams, int, FinishReason]:
        """Sampling settings, the most tokens that fit, and what ends the answer there.

        Raises:
            InputError: a setting cannot be used, or no position is left for the answer.
        """
        params = (params or SamplingParams()).override(**overrides)
        room = self.model.max_positions - len(prompt)
        if room < 1:
            rows = sum(last - first for first, last in prompt.image_spans)
            raise InputError(
                f"The prompt takes {len(prompt)} positions ({len(prompt) - rows} of text, "
                f"{rows} of {len(prompt.image_spans)} image(s)), but the model has "
                f"{self.model.max_positions}, and at least one must be left for the answer; "
                "shorten the text, give fewer images, or start a new chat."
            )
        if params.max_tokens > room:
            return params, room, "context"
        return params, params.max_tokens, "length"

    @contextmanager
    def _lease_state(self) -> Iterator[DecoderState]:
        state = self._free.pop() if self._free else self.new_state()
        try:
            state.cache.truncate(0)
            yield state
        finally:
            self._free.append(state)


class ChatSession:
    """A conversation that keeps its cache: each turn prefills what is new only.

    What the model sees in a turn is always the whole conversation, tokenised in its template;
    cache rows are reused as far as their ids agree with it. Mostly that is all of them. An
    answer that the model spelt in other tokens than the tokenizer would, or that a stop string
    cut, is run again from there.

    A turn that is interrupted stays in the conversation with the text it had reached; one that
    fails, or is interrupted before its first token, is forgotten.
    """

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._state = vlm.new_state()
        self._stream: AnswerStream | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every turn."""
        self._end_stream()
        self._state.cache.truncate(0)
        self.conversation = self._vlm.conversation()
        self._image_embeds = self._vlm.no_image()[:0]

    def ask(
        self,
        question: str,
        images: Images = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> Answer:
        """The next turn; arguments and errors as :meth:`VLM.generate`."""
        return self.stream(question, images, params, **overrides).read()

    def stream(
        self,
        question: str,
        images: Images = None,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> AnswerStream:
        """As :meth:`ask`, text by text; an earlier stream of this chat is closed."""
        self._end_stream()
        vlm, sources = self._vlm, as_list(images)
        asked = self.conversation.ask(question, len(sources))
        prompt = vlm.tokenize(asked)
        embeds = self._image_embeds

        def embed(clock: PhaseClock) -> FloatArray:
            nonlocal embeds
            if sources:
                embeds = np.concatenate([embeds, vlm.embed_images(sources, clock)])
            return embeds if len(embeds) else vlm.no_image()

        def commit(answer: Answer) -> None:
            self.conversation = asked.answer(answer.text)
            self._image_embeds = embeds

        plan = vlm.plan(prompt, params, overrides)
        request = Request(prompt, *plan, embed=embed, lease=self._lend_state, commit=commit)
        self._stream = AnswerStream(vlm.text_model, request)
        return self._stream

    @contextmanager
    def _lend_state(self) -> Iterator[DecoderState]:
        yield self._state

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def as_list(images: Images) -> list[ImageSource]:
    """The pictures of a call, none to many, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _forget(answer: Answer) -> None:
    """What is done with the answer to a single question: nothing."""
