"""How good a bundle's answers are beside PyTorch's in float32: ``measure_accuracy``.

From picture to logits through the runtime: a decoder gets the image rows of the bundle's own
encoder and projector, so what all three graphs lose is in the figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from mvlm_export.calibration.data import Sample
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.manifest import GRAPHS

from .accuracy_report import AccuracyReport, ExactAnswers, ForcedScores, find_failures
from .accuracy_weights import bundle_weight_bytes, layer_noise
from .parity_report import EndToEndParity
from .parity_runtime import RuntimeSide
from .parity_setup import DEFAULT_MAX_TOKENS, Comparison, Listener, NoListener
from .parity_spool import open_spool
from .parity_torch import TorchSide
from .reference import ReferenceModel, torch_threads
from .tolerances import TOLERANCES, coarsest_precision, precision_of


def measure_accuracy(
    bundle: Bundle,
    reference: ReferenceModel,
    samples: Sequence[Sample],
    listener: Listener | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    threads: int | None = None,
    backend: str | None = None,
) -> AccuracyReport:
    """Answer the samples on both sides, greedily and teacher-forced.

    :class:`.parity.ParityCheck` gives the same report beside its own; this one leaves out what
    compares graph by graph.

    Args:
        reference: of the checkpoint that the bundle was made from; released at the end.
        samples: with answers, where they have some.
        listener: told what goes on.
        max_tokens: longest greedy answer.
        threads: of PyTorch, and of ONNX Runtime where that runs the graphs; None means their
            defaults.
        backend: what runs the bundle, as for :class:`.parity.ParityCheck`.

    Raises:
        InputError: a sample, ``max_tokens`` or the backend cannot be used; no model has been
            loaded then.
        EngineError: a graph cannot be loaded; PyTorch's results cannot be kept on disk.
        MissingPackageError: the backend's package is not installed.
    """
    listener = listener or NoListener()
    given = Comparison.prepare(
        bundle, reference, samples, listener, max_tokens, threads, backend
    )
    with torch_threads(threads), open_spool(bundle.path) as spool:
        try:
            side = TorchSide(given, spool)
            side.run_images()
            answers = side.run_answers()
        finally:
            reference.release()
        found, scores = RuntimeSide(given, spool).run_answers(answers)
    return report_accuracy(bundle, found, scores)


def report_accuracy(
    bundle: Bundle, found: EndToEndParity, scores: ForcedScores
) -> AccuracyReport:
    """Put a bundle's figures together and judge them.

    Raises:
        BundleError: a graph's file cannot be read.
    """
    manifest = bundle.manifest
    tokens = scores.figures()
    answers = ExactAnswers(
        found.known, found.accuracy, found.reference_accuracy, found.by_kind
    )
    return AccuracyReport(
        precision={name: precision_of(manifest, name) for name in GRAPHS},
        weight_bytes=bundle_weight_bytes(bundle),
        layers=layer_noise(manifest),
        tokens=tokens,
        answers=answers,
        failures=find_failures(tokens, answers, TOLERANCES[coarsest_precision(manifest)]),
    )
