"""Choose integers for the graphs of one compile, on real pictures, questions and answers.

The encoder sees pictures, the projector the float encoder's features, the decoder whole
prompts with the float projector's image rows and the true answers, teacher-forced. Each graph
is quantized as its exact rewrites leave it, but with the logits of every row, so that the last
layers see every row too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.calibration.content_key import samples_key
from mvlm_export.calibration.data import Sample
from mvlm_export.calibration.feeds import DecoderCase, append_feeds, decoder_cases, pixel_feeds
from mvlm_export.calibration.graph_walker import Values
from mvlm_export.calibration.quantize_graph import GraphQuantization, quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import Recipe
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.passes.base import PassManager, numpy_dtype
from mvlm_export.passes.deferred import Array
from mvlm_export.passes.pipeline import LAST_ROW_PASS, exact_steps

from .optimize import GraphPlan
from .reference import ReferenceModel, torch_threads

REVISION = 1
"""Counts changes of the algorithms: weights kept by another revision are not used."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationInputs:
    """What the integers are chosen on and kept under.

    Attributes:
        samples: with answers, where they have some.
        fingerprint: of the checkpoint.
        folder: keeps finished weights until the compile is done.
    """

    recipe: Recipe
    samples: Sequence[Sample]
    fingerprint: str
    folder: Path


class ModelQuantizer:
    """Quantizes the graphs of one model, one after another.

    Args:
        reference: gives image features and rows.
        progress: told of each layer.
    """

    def __init__(
        self,
        given: CalibrationInputs,
        plan: GraphPlan,
        model: ModelSpec,
        tokenizer: LlamaTokenizer,
        reference: ReferenceModel,
        progress: Progress,
    ) -> None:
        self.given = given
        self.plan = plan
        self.model = model
        self.tokenizer = tokenizer
        self.reference = reference
        self.progress = progress

    def quantize(self, name: str, graph: gs.Graph) -> GraphQuantization:
        """What becomes of one captured graph; the graph itself is not changed.

        Raises:
            InputError: samples that cannot be used, activations that are not finite.
            MvlmError: weights cannot be kept on disk, or the graph cannot be run.
        """
        recipe = self.given.recipe.graph(name)
        if recipe.is_float:
            return GraphQuantization({}, {})
        store = WeightStore(self.given.folder / name, self._key(name))
        graph = self.exact(name, graph)
        with torch_threads(self.plan.threads):
            return quantize_graph(
                graph,
                recipe,
                store,
                lambda: self.feeds(name, graph),
                self.plan.threads,
                self.progress,
            )

    def exact(self, name: str, graph: gs.Graph) -> gs.Graph:
        """A captured graph's copy behind its exact rewrites, with the logits of every row."""
        options = self.plan.options
        options = replace(options, disabled=options.disabled | {LAST_ROW_PASS}, progress=None)
        exact = graph.copy()
        PassManager(exact_steps(name, self.plan.facts, options)).run(exact)
        return exact

    def close(self) -> None:
        """Remove the kept weights; call it when the graphs are written."""
        shutil.rmtree(self.given.folder, ignore_errors=True)

    def _key(self, name: str) -> dict[str, Any]:
        given, recipe = self.given, self.given.recipe.graph(name)
        return {
            "revision": REVISION,
            "fingerprint": given.fingerprint,
            "graph": name,
            "recipe": asdict(recipe),
            "samples": samples_key(given.samples) if recipe.needs_data else None,
            "template": self.model.template,
            "max_positions": self.model.max_positions,
            "disabled": sorted(self.plan.options.disabled),
            "enabled": sorted(self.plan.options.enabled),
        }

    def feeds(self, name: str, exact: gs.Graph) -> Sequence[Values]:
        """Inputs of a graph for each sample.

        Args:
            exact: what :meth:`exact` gave.

        Raises:
            InputError: a sample cannot be used; it is named.
        """
        if name == "vision_encoder":
            dtype = np.dtype(numpy_dtype(exact.inputs[0])).name
            return list(pixel_feeds(self.model, self.given.samples, dtype))
        if name == "projector":
            return [{"image_features": features} for features in self._features]
        return [
            append_feeds(self.model, case.ids, embeds)
            for case, embeds in zip(self.cases, self._embeds, strict=True)
        ]

    @cached_property
    def _features(self) -> list[Array]:
        """float32 [1, N, C] of each sample."""
        found = []
        for feed in pixel_feeds(self.model, self.given.samples, "float32"):
            found.append(self.reference.image_features(feed["pixel_values"]))
            self.progress(len(found), len(self.given.samples), "image features")
        self.reference.release()
        return found

    @cached_property
    def _embeds(self) -> list[Array]:
        """float32 [rows, D] of each sample."""
        found: list[Array] = []
        for features in self._features:
            rows = self.reference.image_embeds(features)
            found.append(rows.reshape(-1, rows.shape[-1]))
        self.reference.release()
        return found

    @cached_property
    def cases(self) -> list[DecoderCase]:
        """Prompts with answers, teacher-forced."""
        return decoder_cases(self.model, self.tokenizer, self.given.samples)
