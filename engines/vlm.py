"""The runtime: pictures and a question to a streamed answer.

``VLM.load("bundle").generate("kitchen.jpg", "What is on the table?").text``
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from .backends import PLAN_BACKENDS, choose_backend, open_backend
from .bundle import Bundle
from .decoder_state import DecoderState, Digests, StatePool
from .errors import InputError
from .generation import Answer, AnswerStream, FinishReason, Request, TextModel
from .image_encoder import CACHED_IMAGES, ImageCache, ImageEncoder, ImageRows
from .load_image import ImageSource
from .prefix import PromptPrefix, load_prefix
from .prompt import Conversation, PromptIds, get_template, tokenize_prompt
from .sampling import SamplingParams
from .session import Backend, BackendOptions, FloatArray
from .targets import get_target
from .timings import PhaseClock
from .tokenizer import LlamaTokenizer

Images: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
"""No picture, one (all that ``load_image`` takes), or a list or tuple of them."""


class VLM:
    """A bundle, opened and ready to answer; made by :meth:`load`.

    Answers of one ``VLM`` may be streamed side by side: each has a cache of its own, which
    goes back to a pool at its end. What is in it stays, and so do the image rows of the
    pictures seen last: a further question about the same picture runs the question alone.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        started: float | None = None,
        *,
        use_prefix: bool = True,
        reuse: bool = True,
    ) -> None:
        """From what is open already.

        Args:
            started: ``time.perf_counter()`` when opening began; None for now.
            use_prefix: as for :meth:`load`.
            reuse: as for :meth:`load`.

        Raises:
            BundleError: the bundle's prompt prefix or tokenizer cannot be used.
        """
        started = time.perf_counter() if started is None else started
        self.bundle = bundle
        self.model = model = bundle.manifest.model
        self._template = get_template(model.template)
        tokenizer = LlamaTokenizer.from_folder(bundle.tokenizer_path)
        cache = ImageCache(CACHED_IMAGES if reuse else 0)
        self._encoder = ImageEncoder(bundle.manifest, backend, cache)
        prefix = _read_prefix(bundle) if use_prefix else None
        self._states = StatePool(backend.open_decoder(), prefix, reuse)
        seconds = time.perf_counter() - started
        stop_ids = frozenset(model.stop_ids)
        self.text_model = TextModel(tokenizer, model.vocab_size, stop_ids, seconds)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str | None = None,
        provider: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        *,
        use_prefix: bool = True,
        reuse: bool = True,
    ) -> VLM:
        """Open a bundle.

        Args:
            path: the bundle's folder.
            backend: a key of ``engines.backends.BACKENDS``. None takes TensorRT where there
                are a GPU and plans for it and neither ``provider`` nor ``threads`` is given,
                which are ONNX Runtime's; else ONNX Runtime.
            provider: the device kind, in the backend's terms; ``cpu`` or ``cuda``. None takes
                what the bundle's target runs on: for a target with engines the GPU for its
                plans, and the CPU for its ONNX files.
            threads: CPU threads for one operator; None means the backend's default.
            verify: compare every file with its hash first (reads the whole bundle); plans that
                are run are compared in any case.
            use_prefix: begin with the bundle's prompt prefix, where it has one.
            reuse: keep image rows and cache rows from one question to the next; without, each
                question costs what a first one does.

        Raises:
            BundleError: the bundle is missing or damaged.
            InputError: there is no such backend or provider.
            MissingPackageError: the backend's package is not installed.
            EngineError: the graphs cannot run here.
        """
        started = time.perf_counter()
        bundle = Bundle.load(path, verify)
        target = get_target(bundle.manifest.target, bundle.manifest.jetpack)
        if backend is None:
            for_onnx = provider is not None or threads is not None
            backend = "onnxruntime" if for_onnx else choose_backend(bundle)
        if provider is None:
            provider = "cuda" if backend in PLAN_BACKENDS else target.provider
        options = BackendOptions(provider, threads)
        opened = open_backend(bundle, backend, options)
        return cls(bundle, opened, started, use_prefix=use_prefix, reuse=reuse)

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
        asked = self.conversation().ask(question, len(sources))
        return self.stream_conversation(asked, sources, params, **overrides)

    def stream_conversation(
        self,
        conversation: Conversation,
        images: Images,
        params: SamplingParams | None = None,
        **overrides: Any,
    ) -> AnswerStream:
        """As :meth:`stream`, behind turns that are given; :meth:`chat` keeps its own.

        Args:
            conversation: its last question has no answer yet; from :meth:`conversation`.
            images: those of all its turns, in their order.

        Raises:
            InputError: there are more or fewer images than the conversation has; and as
                :meth:`generate`.
        """
        sources = as_list(images)
        if len(sources) != conversation.image_count:
            raise InputError(
                f"The conversation has {conversation.image_count} image(s), but "
                f"{len(sources)} were given; give those of all its turns, in their order."
            )
        prompt = self.tokenize(conversation)

        def embed(clock: PhaseClock) -> ImageRows:
            return self.encode_images(sources, clock)

        return AnswerStream(
            self.text_model,
            Request(
                prompt,
                *self.plan(prompt, params, overrides),
                embed=embed,
                lease=self._states.lease,
                commit=_forget,
                new_images=len(sources),
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

    def embed_images(self, sources: Sequence[ImageSource]) -> FloatArray:
        """Rows [images * image_tokens, D] of pictures; see :meth:`encode_images`."""
        return self.encode_images(sources).embeds

    def encode_images(
        self, sources: Sequence[ImageSource], clock: PhaseClock | None = None
    ) -> ImageRows:
        """As :meth:`ImageEncoder.encode`."""
        return self._encoder.encode(sources, clock or PhaseClock())

    def new_state(self) -> DecoderState:
        """A cache with its ids, which holds the prompt prefix alone."""
        return self._states.new_state()

    def renew_state(self, state: DecoderState) -> None:
        """As :meth:`StatePool.renew`."""
        self._states.renew(state)

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


class ChatSession:
    """A conversation that keeps its cache: each turn prefills what is new only.

    What the model sees in a turn is always the whole conversation, tokenised in its template;
    cache rows are reused as far as their ids and pictures agree with it. Mostly that is all of
    them. An answer that the model spelt in other tokens than the tokenizer would, or that a
    stop string cut, is run again from there.

    A turn that is interrupted stays in the conversation with the text it had reached; one that
    fails, or is interrupted before its first token, is forgotten.
    """

    def __init__(self, vlm: VLM) -> None:
        self._vlm = vlm
        self._state = vlm.new_state()
        # Weak, as the stream's request refers to the chat.
        self._stream: weakref.ref[AnswerStream] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every turn; what the cache holds is reused if the next ones begin alike."""
        self._end_stream()
        self._vlm.renew_state(self._state)
        self.conversation = self._vlm.conversation()
        self._images = self._vlm.encode_images([])

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
        shown = self._images

        def embed(clock: PhaseClock) -> ImageRows:
            nonlocal shown
            shown = shown.followed_by(vlm.encode_images(sources, clock))
            return shown

        def commit(answer: Answer) -> None:
            self.conversation = asked.answer(answer.text)
            self._images = shown

        request = Request(
            prompt,
            *vlm.plan(prompt, params, overrides),
            embed=embed,
            lease=self._lend_state,
            commit=commit,
            new_images=len(sources),
        )
        stream = AnswerStream(vlm.text_model, request)
        self._stream = weakref.ref(stream)
        return stream

    def _lend_state(
        self, prompt: PromptIds, images: Digests
    ) -> AbstractContextManager[DecoderState]:
        return nullcontext(self._state)

    def _end_stream(self) -> None:
        stream = self._stream() if self._stream is not None else None
        if stream is not None:
            stream.close()


def as_list(images: Images) -> list[ImageSource]:
    """The pictures of a call, none to many, as a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


def _read_prefix(bundle: Bundle) -> PromptPrefix | None:
    path, manifest = bundle.prefix_path, bundle.manifest
    return None if path is None else load_prefix(path, manifest.model, manifest.cache_dtype)


def _forget(answer: Answer) -> None:
    """What is done with the answer to a single question: nothing."""
