"""Parity: the compiled graphs against PyTorch in float32, graph by graph and end to end.

A backend of the runtime's runs the graphs: ONNX Runtime, or TensorRT with the bundle's plans.
The encoder is compared on pictures, the projector on PyTorch's own features, the decoder
teacher-forced on PyTorch's greedy answer, on logits and on new cache rows, prefill and
one-token steps alike. End to end, the runtime itself answers the same questions, and is
teacher-forced on the true answers (:mod:`.accuracy`).

One component of either side is in memory at a time (the runtime, which comes last, has its
three), and what PyTorch gave lies on disk until it is compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from mvlm_export.calibration.data import Sample
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.image_processor import encoder_input

from .accuracy import report_accuracy
from .parity_cases import Case
from .parity_decoder import TokenFigures, forced_steps, measure
from .parity_report import EndToEndParity, GraphParity, ParityReport
from .parity_runtime import RuntimeSide
from .parity_session import ForcedDecoder
from .parity_setup import DEFAULT_MAX_TOKENS, Comparison, Listener
from .parity_spool import Spool, open_spool
from .parity_torch import TorchSide, image_rows
from .reference import ReferenceModel, torch_threads
from .tolerances import TOLERANCES, precision_of

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "EndToEndParity",
    "GraphParity",
    "Listener",
    "ParityCheck",
    "ParityReport",
]


class ParityCheck:
    """Measures a bundle against the checkpoint it was made from.

    Args:
        max_tokens: longest answer; shorter where a prompt leaves less room in the model.
        threads: of PyTorch during the check, and of ONNX Runtime where that runs the graphs;
            None means their defaults.
        backend: what runs the bundle, of ``engines.backends.BACKENDS``; None takes TensorRT
            where there are a GPU and plans for it, else ONNX Runtime.

    Raises:
        InputError: a sample, ``max_tokens`` or the backend cannot be used; no model has been
            loaded then.
        MissingPackageError: the backend's package is not installed.
        EngineError: the backend cannot run here.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: ReferenceModel,
        samples: Sequence[Sample],
        listener: Listener,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        self._given = given = Comparison.prepare(
            bundle, reference, samples, listener, max_tokens, threads, backend
        )
        self.bundle, self.reference, self.threads = bundle, reference, threads
        self.cases, self.model = given.cases, given.model

    def run(self) -> ParityReport:
        """All comparisons, in the order that keeps memory low.

        Raises:
            EngineError: a graph cannot run, or is not of the checkpoint's geometry; PyTorch's
                results cannot be kept on disk.
        """
        with torch_threads(self.threads), open_spool(self.bundle.path) as spool:
            try:
                side = TorchSide(self._given, spool)
                side.run_images()
                vision = self._compare_images("vision_encoder", "pixels", "features", spool)
                projector = self._compare_images("projector", "features", "embeds", spool)
                answers = side.run_answers()
            finally:
                self.reference.release()
            decoder = self._compare_decoder(answers, spool)
            end_to_end, scores = RuntimeSide(self._given, spool).run_answers(answers)
        accuracy = report_accuracy(self.bundle, end_to_end, scores)
        graphs = [vision, projector, decoder]
        return ParityReport(self._given.backend_name, graphs, end_to_end, accuracy)

    def _compare_images(
        self, name: str, inputs: str, outputs: str, spool: Spool
    ) -> GraphParity:
        parity = GraphParity(name, precision_of(self.bundle.manifest, name))
        cases = self._given.each_case(f"Comparing {name} with PyTorch", name)
        config = self._given.image_config
        with self._given.graphs.open_graph(name) as graph:
            for case in cases:
                values = spool.read(inputs, case.index)
                if name == "vision_encoder":
                    values = encoder_input(values, config, self.bundle.manifest.pixel_dtype)
                found = graph.run(values)
                wanted = spool.read(outputs, case.index)
                parity.values = parity.values.worst(measure(name, found, wanted))
        parity.check("outputs", parity.values, TOLERANCES[parity.precision])
        return parity

    def _compare_decoder(self, answers: list[list[int]], spool: Spool) -> GraphParity:
        parity = GraphParity("decoder", precision_of(self.bundle.manifest, "decoder"))
        bound = TOLERANCES[parity.precision]
        figures = TokenFigures(bound.tie, answer_rows=not bound.judges_each)
        title = "Comparing decoder with PyTorch, teacher-forced"
        cases = self._given.each_case(title, "decoder")
        with self._given.graphs.open_decoder() as decoder:
            for case in cases:
                self._force_case(decoder, case, answers[case.index], figures, spool)
        parity.values, parity.cache = figures.logits, figures.cache
        for what, values in (("logits", parity.values), ("cache rows", parity.cache)):
            if bound.judges_each:
                parity.check(what, values, bound)
            else:
                parity.check_finite(what, values)
        parity.check_tokens(figures.kl, figures.kl_mean, figures.top1, bound)
        return parity

    def _force_case(
        self,
        decoder: ForcedDecoder,
        case: Case,
        answer: list[int],
        figures: TokenFigures,
        spool: Spool,
    ) -> None:
        run, embeds = spool.read_run(case.index), image_rows(spool, case)
        for found, wanted in forced_steps(decoder, case.prompt, embeds, answer, run):
            figures.add(found, wanted)
