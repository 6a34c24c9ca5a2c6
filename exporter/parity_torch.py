"""PyTorch's side of a comparison: pictures, greedy answers and forced answers, kept on disk.

Forced is the true answer where the sample has one, else PyTorch's greedy one. Its logits come
from one run over the prompt and the answer; that the rows are those of a run token by token is
the causal mask's doing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mvlm_export.engines.image_processor import normalize

from .parity_cases import Case, pixels_of
from .parity_setup import Comparison
from .parity_spool import Spool
from .reference import ForcedRun, ReferenceModel

Array = npt.NDArray[Any]


class TorchSide:
    """One component in memory at a time; ``reference.release()`` gives the last one back."""

    def __init__(self, comparison: Comparison, spool: Spool) -> None:
        self._given = comparison
        self._reference = comparison.reference
        self._spool = spool

    def run_images(self) -> None:
        """Keep ``pixels``, ``features`` and ``embeds`` of each case.

        Raises:
            EngineError: they cannot be kept on disk.
        """
        given, spool, reference = self._given, self._spool, self._reference
        config = given.image_config
        for case in given.each_case("Running PyTorch's vision encoder", "vision_encoder"):
            pixels = pixels_of(case.sample, given.model)
            spool.write("pixels", case.index, pixels)
            features = reference.image_features(normalize(pixels, config))
            spool.write("features", case.index, features)
        reference.release()
        for case in given.each_case("Running PyTorch's projector", "projector"):
            features = spool.read("features", case.index)
            spool.write("embeds", case.index, reference.image_embeds(features))
        reference.release()

    def run_answers(self) -> list[list[int]]:
        """Greedy answers, stop ids included; the runs and ``forced`` logits are kept.

        Raises:
            EngineError: they cannot be kept on disk.
        """
        cases = self._given.each_case("Answering with PyTorch", "answers")
        return [self._run_answer(case) for case in cases]

    def _run_answer(self, case: Case) -> list[int]:
        embeds = image_rows(self._spool, case)
        stops = self._given.model.stop_ids
        answer, run = self._reference.greedy_run(case.prompt, embeds, case.limit, stops)
        self._spool.write_run(case.index, run)
        forced = case.forced_ids(answer)
        if forced == answer:
            logits = _answer_rows(run)
        else:
            ids = np.concatenate([case.prompt, np.array(forced[:-1], np.int32)])
            logits = all_logits(self._reference, ids, embeds)[len(case.prompt) - 1 :]
        self._spool.write("forced", case.index, logits)
        return answer


def image_rows(spool: Spool, case: Case) -> Array:
    """PyTorch's image rows [image tokens, D] of a case."""
    embeds = spool.read("embeds", case.index)
    return embeds.reshape(-1, embeds.shape[-1])


@torch.inference_mode()
def all_logits(
    reference: ReferenceModel, ids: npt.NDArray[np.int32], embeds: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Logits [S, V] of a whole sequence [S] on an empty cache."""
    text = reference.config.text
    empty = torch.zeros(0, text.num_key_value_heads, text.head_dim)
    past = [empty] * (2 * text.num_hidden_layers)
    outputs = reference.decoder(torch.from_numpy(ids), torch.from_numpy(embeds), past)
    logits: npt.NDArray[np.float32] = outputs[0].numpy()
    return logits


def _answer_rows(run: ForcedRun) -> Array:
    """Logits that each token of the answer was chosen from."""
    return np.concatenate([run.prefill.logits[-1:], *(step.logits for step in run.decode)])
