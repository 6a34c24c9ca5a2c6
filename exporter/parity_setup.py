"""What the two sides of a comparison share, and the listener that is told what goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mvlm_export.calibration.data import Sample
from mvlm_export.engines.backends import choose_backend
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.image_processor import ImageProcessorConfig
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.sampling import SamplingParams
from mvlm_export.engines.session import Backend
from mvlm_export.engines.tokenizer import LlamaTokenizer

from .parity_cases import Case, prepare_cases
from .parity_session import ParityGraphs, open_graphs
from .reference import ReferenceModel

DEFAULT_MAX_TOKENS = 40
"""Longest answer that is compared, in tokens."""


class Listener(Protocol):
    """Told what goes on; see ``exporter.cli.console`` for the one that draws bars."""

    def stage(self, title: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` parts of the stage are finished."""


class NoListener:
    """A listener that does nothing."""

    def stage(self, title: str) -> None:
        """Nothing."""

    def advance(self, done: int, total: int, label: str) -> None:
        """Nothing."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A bundle, the checkpoint it was made from, and samples made ready.

    Attributes:
        params: greedy, with the longest answer.
        backend_name: what runs the bundle.
        backend: the same, opened; whole answers come from it.
        graphs: the same, for one graph at a time.
    """

    bundle: Bundle
    reference: ReferenceModel
    cases: Sequence[Case]
    listener: Listener
    tokenizer: LlamaTokenizer
    params: SamplingParams
    backend_name: str
    backend: Backend
    graphs: ParityGraphs

    @classmethod
    def prepare(
        cls,
        bundle: Bundle,
        reference: ReferenceModel,
        samples: Sequence[Sample],
        listener: Listener,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        threads: int | None = None,
        backend: str | None = None,
    ) -> Comparison:
        """Make the samples ready.

        Args:
            threads: of ONNX Runtime; None means its default.
            backend: a key of ``engines.backends.BACKENDS``; None takes TensorRT where there
                are a GPU and plans for it, else ONNX Runtime.

        Raises:
            InputError: a sample, ``max_tokens`` or the backend cannot be used; no model is
                loaded then.
            MissingPackageError: the backend's package is not installed.
            EngineError: the backend cannot run here.
        """
        backend_name = backend or choose_backend(bundle)
        opened, graphs = open_graphs(bundle, backend_name, threads)
        model = bundle.manifest.model
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        tokenizer = LlamaTokenizer.from_folder(bundle.tokenizer_path)
        limits = (model.max_positions, reference.config.text.max_position_embeddings)
        cases = prepare_cases(model, tokenizer, samples, max_tokens, min(limits))
        return cls(
            bundle,
            reference,
            cases,
            listener,
            tokenizer,
            params,
            backend_name,
            opened,
            graphs,
        )

    @property
    def model(self) -> ModelSpec:
        """The bundle's word on the model."""
        return self.bundle.manifest.model

    @property
    def image_config(self) -> ImageProcessorConfig:
        """How pictures become pixels."""
        return ImageProcessorConfig.from_json(self.model.image_processor)

    def each_case(self, title: str, label: str) -> Iterator[Case]:
        """Begin a stage; its cases, with progress as they are done."""
        self.listener.stage(title)

        def cases() -> Iterator[Case]:
            for done, case in enumerate(self.cases, 1):
                yield case
                self.listener.advance(done, len(self.cases), label)

        return cases()

    def text_of(self, ids: Sequence[int]) -> str:
        """An answer's text, without the id that ended it."""
        stops = self.model.stop_ids
        return self.tokenizer.decode([token for token in ids if token not in stops]).strip()
