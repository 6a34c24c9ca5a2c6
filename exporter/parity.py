"""Parity: the compiled graphs against PyTorch in float32, graph by graph and end to end.

The encoder is compared on pictures, the projector on PyTorch's own features, the decoder
teacher-forced on PyTorch's greedy answer, on logits and on new cache rows, prefill and
one-token steps alike. End to end, the runtime itself answers the same questions.

One component of either side is in memory at a time (the runtime, which comes last, has its
three), and what PyTorch gave lies on disk until it is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from mvlm_export.calibration.data import Sample
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.image_processor import (
    ImageProcessorConfig,
    encoder_input,
    normalize,
)
from mvlm_export.engines.ort_api import import_onnxruntime
from mvlm_export.engines.sampling import SamplingParams
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.engines.vlm import VLM

from .parity_answers import judge_answer, record_verdict, score_answers
from .parity_cases import Case, pixels_of, prepare_cases
from .parity_decoder import TokenFigures, forced_steps, measure
from .parity_report import EndToEndParity, GraphParity, ParityReport, Verdict
from .parity_session import DecoderRunner, GraphRunner
from .parity_spool import Spool, open_spool
from .reference import ReferenceModel, torch_threads
from .tolerances import TOLERANCES

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "EndToEndParity",
    "GraphParity",
    "Listener",
    "ParityCheck",
    "ParityReport",
]

Array = npt.NDArray[Any]

DEFAULT_MAX_TOKENS = 40
"""Longest answer that is compared, in tokens."""


class Listener(Protocol):
    """Told what goes on; see ``exporter.cli.console`` for the one that draws bars."""

    def stage(self, title: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` parts of the stage are finished."""


class ParityCheck:
    """Measures a bundle against the checkpoint it was made from.

    Args:
        max_tokens: longest answer; shorter where a prompt leaves less room in the model.
        threads: of ONNX Runtime and of PyTorch, during the check; None means their defaults.

    Raises:
        InputError: a sample or ``max_tokens`` cannot be used; no model has been loaded then.
        MissingPackageError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: ReferenceModel,
        samples: Sequence[Sample],
        listener: Listener,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        threads: int | None = None,
    ) -> None:
        import_onnxruntime()
        self.bundle = bundle
        self.reference = reference
        self.listener = listener
        self.threads = threads
        self.model = model = bundle.manifest.model
        self._image_config = ImageProcessorConfig.from_json(model.image_processor)
        self._params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self._tokenizer = LlamaTokenizer.from_folder(bundle.tokenizer_path)
        limits = (model.max_positions, reference.config.text.max_position_embeddings)
        self.cases = prepare_cases(model, self._tokenizer, samples, max_tokens, min(limits))

    def run(self) -> ParityReport:
        """All comparisons, in the order that keeps memory low.

        Raises:
            EngineError: a graph cannot run, or is not of the checkpoint's geometry; PyTorch's
                results cannot be kept on disk.
        """
        with torch_threads(self.threads), open_spool(self.bundle.path) as spool:
            try:
                self._run_reference_images(spool)
                vision = self._compare_images("vision_encoder", "pixels", "features", spool)
                projector = self._compare_images("projector", "features", "embeds", spool)
                answers = self._run_reference_answers(spool)
            finally:
                self.reference.release()
            decoder = self._compare_decoder(answers, spool)
            end_to_end = self._compare_answers(answers, spool)
        return ParityReport([vision, projector, decoder], end_to_end)

    def _each_case(self, title: str, label: str) -> Iterator[Case]:
        """Begin a stage; its cases, with progress as they are done."""
        self.listener.stage(title)

        def cases() -> Iterator[Case]:
            for done, case in enumerate(self.cases, 1):
                yield case
                self.listener.advance(done, len(self.cases), label)

        return cases()

    def _run_reference_images(self, spool: Spool) -> None:
        for case in self._each_case("Running PyTorch's vision encoder", "vision_encoder"):
            pixels = pixels_of(case.sample, self.model)
            spool.write("pixels", case.index, pixels)
            features = self.reference.image_features(normalize(pixels, self._image_config))
            spool.write("features", case.index, features)
        self.reference.release()
        for case in self._each_case("Running PyTorch's projector", "projector"):
            features = spool.read("features", case.index)
            spool.write("embeds", case.index, self.reference.image_embeds(features))
        self.reference.release()

    def _compare_images(
        self, name: str, inputs: str, outputs: str, spool: Spool
    ) -> GraphParity:
        parity = GraphParity(name, self.bundle.manifest.graphs[name].dtype)
        cases = self._each_case(f"Comparing {name} with PyTorch", name)
        with GraphRunner(self.bundle, name, self.threads) as runner:
            for case in cases:
                values = spool.read(inputs, case.index)
                if name == "vision_encoder":
                    values = encoder_input(values, self._image_config, runner.input_dtype)
                found = runner.run(values)[0]
                wanted = spool.read(outputs, case.index)
                parity.values = parity.values.worst(measure(name, found, wanted))
        parity.check("outputs", parity.values, TOLERANCES[parity.dtype])
        return parity

    def _run_reference_answers(self, spool: Spool) -> list[list[int]]:
        """PyTorch's greedy answers, stop ids included; the runs that gave them are kept."""
        cases = self._each_case("Answering with PyTorch", "answers")
        return [self._run_reference_answer(case, spool) for case in cases]

    def _run_reference_answer(self, case: Case, spool: Spool) -> list[int]:
        answer, run = self.reference.greedy_run(
            case.prompt, _image_rows(spool, case), case.limit, self.model.stop_ids
        )
        spool.write_run(case.index, run)
        return answer

    def _compare_decoder(self, answers: list[list[int]], spool: Spool) -> GraphParity:
        parity = GraphParity("decoder", self.bundle.manifest.graphs["decoder"].dtype)
        bound = TOLERANCES[parity.dtype]
        figures = TokenFigures(bound.tie)
        cases = self._each_case("Comparing decoder with PyTorch, teacher-forced", "decoder")
        with DecoderRunner(self.bundle, self.threads) as runner:
            for case in cases:
                self._force_case(runner, case, answers[case.index], figures, spool)
        parity.values, parity.cache = figures.logits, figures.cache
        parity.check("logits", parity.values, bound)
        parity.check("cache rows", parity.cache, bound)
        parity.check_tokens(figures.kl, figures.top1, bound)
        return parity

    def _force_case(
        self,
        runner: DecoderRunner,
        case: Case,
        answer: list[int],
        figures: TokenFigures,
        spool: Spool,
    ) -> None:
        run, embeds = spool.read_run(case.index), _image_rows(spool, case)
        for found, wanted in forced_steps(runner, case.prompt, embeds, answer, run):
            figures.add(found, wanted)

    def _compare_answers(self, answers: list[list[int]], spool: Spool) -> EndToEndParity:
        parity = EndToEndParity(len(self.cases))
        cases = self._each_case("Answering with the runtime", "answers")
        vlm = VLM.load(self.bundle.path, provider="cpu", threads=self.threads, verify=False)
        for case in cases:
            wanted = answers[case.index]
            found, verdict = self._answer(vlm, case, wanted, spool)
            record_verdict(parity, verdict, case.label)
            parity.answers.append(
                {
                    "image": case.sample.image.name,
                    "prompt": case.sample.prompt,
                    "kind": case.sample.kind,
                    "answer": None if found is None else self._text(found),
                    "reference": self._text(wanted),
                    "truth": case.sample.answer,
                    "verdict": verdict.kind,
                }
            )
        score_answers(parity)
        return parity

    def _answer(
        self, vlm: VLM, case: Case, wanted: list[int], spool: Spool
    ) -> tuple[tuple[int, ...] | None, Verdict]:
        """The runtime's ids, None where it failed, and the verdict on them."""
        sample, tie = case.sample, TOLERANCES[self.bundle.manifest.graphs["decoder"].dtype].tie
        try:
            found = vlm.generate(
                sample.image, sample.prompt, self._params, max_tokens=case.limit
            )
        except EngineError as error:  # logits that are not finite, for one
            return None, Verdict("different", f"the runtime gave no answer: {error}")

        def logits_at(place: int) -> Array:
            return spool.read_logits(case.index, place)

        return found.ids, judge_answer(found.ids, wanted, found.finish_reason, logits_at, tie)

    def _text(self, ids: Sequence[int]) -> str:
        stops = self.model.stop_ids
        return self._tokenizer.decode([token for token in ids if token not in stops]).strip()


def _image_rows(spool: Spool, case: Case) -> Array:
    """PyTorch's image rows [image tokens, D] of a case."""
    embeds = spool.read("embeds", case.index)
    return embeds.reshape(-1, embeds.shape[-1])
