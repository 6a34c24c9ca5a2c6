"""The runtime's side of a comparison: greedy and forced answers, from picture to logits.

It runs as a user's does, with image rows of its own encoder and projector and with the shipped
prompt prefix, so whatever a graph loses reaches the answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mvlm_export.engines.decoder_state import DecoderState
from mvlm_export.engines.errors import EngineError
from mvlm_export.engines.vlm import VLM

from .accuracy_report import ForcedScores
from .parity_answers import judge_answer, record_verdict, score_answers
from .parity_cases import Case
from .parity_report import EndToEndParity, Verdict
from .parity_setup import Comparison
from .parity_spool import Spool
from .tolerances import TOLERANCES, coarsest_precision

Array = npt.NDArray[Any]


class RuntimeSide:
    """The bundle in the runtime, beside what :class:`.parity_torch.TorchSide` kept."""

    def __init__(self, comparison: Comparison, spool: Spool) -> None:
        self._given = comparison
        self._spool = spool
        self._bound = TOLERANCES[coarsest_precision(comparison.bundle.manifest)]

    def run_answers(self, answers: list[list[int]]) -> tuple[EndToEndParity, ForcedScores]:
        """Compare every case.

        Args:
            answers: PyTorch's greedy ones.

        Raises:
            EngineError: the graphs cannot be loaded.
        """
        given = self._given
        cases = given.each_case("Answering with the runtime", "answers")
        vlm = VLM(given.bundle, given.backend)
        state = vlm.new_state()
        parity, scores = EndToEndParity(len(given.cases)), ForcedScores(self._bound.tie)
        for case in cases:
            wanted = answers[case.index]
            self._compare_answer(parity, vlm, case, wanted)
            forced = case.forced_ids(wanted)
            reference = self._spool.read("forced", case.index)
            found = _forced_logits(vlm, state, case, forced, reference.shape)
            scores.add(found, reference, forced, known=case.truth is not None)
        score_answers(parity)
        return parity, scores

    def _compare_answer(
        self, parity: EndToEndParity, vlm: VLM, case: Case, wanted: list[int]
    ) -> None:
        found, verdict = self._answer(vlm, case, wanted)
        record_verdict(parity, verdict, case.label, self._bound)
        text = self._given.text_of
        parity.answers.append(
            {
                "image": case.sample.image.name,
                "prompt": case.sample.prompt,
                "kind": case.sample.kind,
                "answer": None if found is None else text(found),
                "reference": text(wanted),
                "truth": case.sample.answer,
                "verdict": verdict.kind,
            }
        )

    def _answer(
        self, vlm: VLM, case: Case, wanted: list[int]
    ) -> tuple[tuple[int, ...] | None, Verdict]:
        """The runtime's ids, None where it failed, and the verdict on them."""
        sample, params = case.sample, self._given.params
        try:
            answering = vlm.stream_conversation(
                case.conversation, sample.image, params, max_tokens=case.limit
            )
            found = answering.read()
        except EngineError as error:  # logits that are not finite, for one
            return None, Verdict("failed", f"the runtime gave no answer: {error}")

        def logits_at(place: int) -> Array:
            return self._spool.read_logits(case.index, place)

        reason, tie = found.finish_reason, self._bound.tie
        return found.ids, judge_answer(found.ids, wanted, reason, logits_at, tie)


def _forced_logits(
    vlm: VLM, state: DecoderState, case: Case, forced: list[int], shape: tuple[int, ...]
) -> Array:
    """Logits [A, V] that each forced token is judged by; NaN where the runtime fails."""
    try:
        rows = vlm.encode_images([case.sample.image])
        state.rewind(case.prompt_ids, rows.digests)
        logits = [state.prefill(case.prompt_ids, rows.embeds)]
        logits += [state.decode_one_token(token, rows.embeds) for token in forced[:-1]]
    except EngineError:
        state.start_anew()
        return np.full(shape, np.nan, np.float32)
    return np.stack(logits)
