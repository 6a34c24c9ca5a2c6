"""Which layers of a checkpoint's graph take few bits well, and a recipe within a budget.

The decoder's layers are compared by next-token distributions over the rows of true answers,
teacher-forced; the other graphs' by the error of their output. See
:mod:`mvlm_export.calibration.sensitivity` for the figure and what it assumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.calibration.budget import Budget, Mix, Option, choose_mix
from mvlm_export.calibration.content_key import samples_key
from mvlm_export.calibration.fisher_estimate import FisherEstimate
from mvlm_export.calibration.graph_walker import Values
from mvlm_export.calibration.layer_rounding import FLOAT, Candidate, Rounding
from mvlm_export.calibration.layers import Layer, LayerKind
from mvlm_export.calibration.mixed_recipe import mixed_graph_recipe
from mvlm_export.calibration.quantize_graph import quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import Recipe
from mvlm_export.calibration.sensitivity import (
    Effect,
    Losses,
    SensitivityAnalysis,
)
from mvlm_export.calibration.smoothing import find_sites
from mvlm_export.engines.errors import InputError
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.deferred import Array
from mvlm_export.passes.pipeline import build_pipeline

from .layer_options import DECODER, candidates_of, constant_bytes, option_bytes
from .parity_metrics import kl_divergence
from .quantize import ModelQuantizer
from .reference import torch_threads
from .settings import budget_name

REVISION = 1
"""Counts changes of the figures: those kept by another revision are not used."""

OUTPUTS = {
    "vision_encoder": "image_features",
    "projector": "image_embeds",
    "decoder": "logits",
}
"""What is compared, by graph."""


@dataclass(frozen=True)
class SensitivityOptions:
    """How layers are measured.

    Attributes:
        as_recipe: round by the recipe's own method; False is the fast search for clips.
        estimate: by gradients, instead of running each changed graph.
        keep_float: patterns of layers that are not to be quantized.
    """

    as_recipe: bool = False
    estimate: bool = False
    keep_float: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerOptions:
    """A layer and what it may become."""

    name: str
    kind: LayerKind
    options: tuple[Option, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        options = {
            str(option.candidate): {"bytes": option.bytes, "loss": option.loss}
            for option in self.options
        }
        return {"name": self.name, "kind": self.kind, "options": options}


@dataclass(frozen=True)
class BudgetChoice:
    """What was chosen within a budget.

    Attributes:
        recipe: for :func:`.compile.compile_checkpoint`.
        mix: an option for each of the layers, in their order.
        chosen: the same by the layers' names.
    """

    budget: Budget
    recipe: Recipe
    mix: Mix
    chosen: Mapping[str, Candidate]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "budget": asdict(self.budget),
            "bytes": self.mix.bytes,
            "predicted_loss": self.mix.loss,
            "bound": self.mix.bound,
            "chosen": {name: str(candidate) for name, candidate in self.chosen.items()},
            "recipe": self.recipe.to_json(),
        }


class GraphSensitivity:
    """One graph's layers: measured, chosen from, and the choice measured.

    Args:
        quantizer: of the model; gives the samples and the graph behind its exact rewrites.
        name: of the graph.
        graph: as captured, with its weights; it is not changed.
        folder: keeps figures, so that another budget needs no new measurement.

    Raises:
        InputError: no layer is left to choose for, or settings that do not go together.
    """

    def __init__(
        self,
        quantizer: ModelQuantizer,
        name: str,
        graph: gs.Graph,
        options: SensitivityOptions,
        folder: Path,
    ) -> None:
        require_mixable(name, quantizer.given.recipe, options)
        self.name = name
        self.options = options
        self.dtype = quantizer.plan.options.dtype
        self.quantizer = quantizer
        self.captured = graph
        self._folder = folder
        self._exact = quantizer.exact(name, graph)
        self._recipe = quantizer.given.recipe
        self._feeds: Sequence[Values] | None = None
        self.rounding: Rounding = "clip"
        if options.as_recipe and name == DECODER:
            self.rounding = self._recipe.decoder.method
        self._analysis = SensitivityAnalysis(
            self._exact,
            OUTPUTS[name],
            self._samples,
            self._effect(),
            self.rounding,
            quantizer.plan.threads,
            quantizer.progress,
        )
        self.layers = self._analysis.layers
        self._candidates = {
            layer.name: candidates_of(name, layer, quantizer.plan.target, options.keep_float)
            for layer in self.layers
        }
        if not any(len(found) > 1 for found in self._candidates.values()):
            raise InputError(
                f"No layer of the {name} is left to quantize: --keep-float names them all."
            )
        self.fixed_bytes = self._fixed_bytes(graph)

    def measure(self) -> list[LayerOptions]:
        """Every layer that can change, with the bytes and the loss of each candidate.

        Raises:
            InputError: samples that cannot be used, or values that are not finite.
            MvlmError: the graph cannot be run, or figures cannot be kept.
        """
        wanted = {name: found for name, found in self._candidates.items() if len(found) > 1}
        kind = "estimated" if self.options.estimate else "measured"
        store = WeightStore(self._folder / f"{self.name}-{kind}-{self.rounding}", self._key())
        with torch_threads(self.quantizer.plan.threads):
            if self.options.estimate:
                losses = self._estimate(wanted, store)
            else:
                losses = self._analysis.measure(wanted, store)
        return [
            LayerOptions(layer.name, layer.kind, self._options_of(layer, losses))
            for layer in self.layers
            if layer.name in wanted
        ]

    def choose(self, layers: Sequence[LayerOptions], budget: Budget) -> BudgetChoice:
        """The best mix within a budget, as a recipe.

        Args:
            layers: what :meth:`measure` gave.

        Raises:
            InputError: the budget cannot be met; the message says what the least is.
        """
        mix = choose_mix([layer.options for layer in layers], budget, self.fixed_bytes)
        chosen = {
            layer.name: option.candidate
            for layer, option in zip(layers, mix.options, strict=True)
        }
        forms = {name: candidate.form for name, candidate in chosen.items()}
        decoder = mixed_graph_recipe(self._recipe.decoder, self.layers, forms)
        name = budget_name(self._recipe.name, budget)
        recipe = replace(self._recipe, name=name, decoder=decoder)
        return BudgetChoice(budget, recipe, mix, chosen)

    def measure_mix(self, chosen: Mapping[str, Candidate]) -> float:
        """Loss of all choices at once, rounded as they were measured."""
        return self._analysis.measure_mix(chosen)

    def measure_recipe(self, recipe: Recipe) -> float:
        """Loss of the graph that a recipe gives, rounded by its own method.

        Raises:
            MvlmError: it cannot be quantized or run.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        plan, graph = self.quantizer.plan, self._exact.copy()
        with TemporaryDirectory(dir=self._folder) as name, torch_threads(plan.threads):
            chosen = quantize_graph(
                self._exact.copy(),
                recipe.graph(self.name),
                WeightStore(Path(name) / "weights", {}),
                self._samples,
                plan.threads,
                self.quantizer.progress,
            )
            PassManager(chosen.steps()).run(graph)
            return self._analysis.compare(graph)

    def _fixed_bytes(self, graph: gs.Graph) -> int:
        """Bytes of what no choice changes: tables, biases, and layers kept in float.

        AWQ's scales are counted in whole, though some need no vector of their own.
        """
        plan = self.quantizer.plan
        options = replace(plan.options, dtype="float32", progress=None)
        finished = graph.copy()
        PassManager(build_pipeline(self.name, plan.facts, plan.target, options)).run(finished)
        fixed = constant_bytes(finished, self.dtype)
        for layer in self.layers:
            if len(self._candidates[layer.name]) > 1:
                fixed -= option_bytes(layer, FLOAT, self.dtype)
        if self.name == DECODER and "awq" in self._recipe.decoder.method:
            channels = sum(site.tensor.shape[-1] for site in find_sites(self._exact))
            fixed += channels * np.dtype(self.dtype).itemsize
        return fixed

    # How

    def _samples(self) -> Sequence[Values]:
        if self._feeds is None:
            self._feeds = self.quantizer.feeds(self.name, self._exact)
        return self._feeds

    def _effect(self) -> Effect:
        if self.name == DECODER:
            return Effect(
                lambda place, logits: logits[self._rows(place, len(logits))], kl_divergence
            )
        return Effect(lambda place, output: output, _squared_error)

    def _rows(self, place: int, count: int) -> list[int]:
        """Rows whose next token is the answer's; the last of a prompt without an answer."""
        case = self.quantizer.cases[place]
        found = list(range(case.answer_start - 1, count - 1))
        return found or [count - 1]

    def _options_of(self, layer: Layer, losses: Losses) -> tuple[Option, ...]:
        return tuple(
            Option(c, option_bytes(layer, c, self.dtype), losses[layer.name][c])
            for c in self._candidates[layer.name]
        )

    def _estimate(
        self, wanted: Mapping[str, Sequence[Candidate]], store: WeightStore
    ) -> Losses:
        kept = store.read_json("losses") or {}
        if any(str(c) not in kept.get(name, {}) for name, cs in wanted.items() for c in cs):
            estimate = FisherEstimate(
                self._exact,
                OUTPUTS[self.name],
                self._rows,
                self.rounding,
                self.quantizer.plan.threads,
                self.quantizer.progress,
            )
            found = estimate.run(wanted, self._samples(), store.folder)
            kept |= {
                name: kept.get(name, {}) | {str(c): loss for c, loss in losses.items()}
                for name, losses in found.items()
            }
            store.write_json("losses", kept)
        return {
            name: {c: float(kept[name][str(c)]) for c in candidates}
            for name, candidates in wanted.items()
        }

    def _key(self) -> dict[str, Any]:
        quantizer = self.quantizer
        options = quantizer.plan.options
        return {
            "revision": REVISION,
            "fingerprint": quantizer.given.fingerprint,
            "graph": self.name,
            "rounding": self.rounding,
            "samples": samples_key(quantizer.given.samples),
            "template": quantizer.model.template,
            "max_positions": quantizer.model.max_positions,
            "disabled": sorted(options.disabled),
            "enabled": sorted(options.enabled),
        }


def recipe_for_budget(
    quantizer: ModelQuantizer,
    graph: gs.Graph,
    budget: Budget,
    options: SensitivityOptions,
    folder: Path,
) -> BudgetChoice:
    """Measure the decoder's layers and choose a recipe within a budget.

    Args:
        quantizer: with a recipe that quantizes the decoder's weights alone, and samples.
        graph: the captured decoder, with its weights; it is not changed.
        folder: keeps figures between runs.

    Raises:
        InputError: the budget cannot be met, or the recipe has 8-bit activations.
        MvlmError: the graph cannot be run, or figures cannot be kept.
    """
    sensitivity = GraphSensitivity(quantizer, DECODER, graph, options, folder)
    return sensitivity.choose(sensitivity.measure(), budget)


def require_mixable(name: str, recipe: Recipe, options: SensitivityOptions) -> None:
    """Refuse what leaves nothing to measure or to mix.

    Args:
        name: of the graph.

    Raises:
        InputError: the recipe has 8-bit activations, or options do not go with the graph.
    """
    if name == DECODER and (recipe.decoder.activations or recipe.decoder.attention):
        raise InputError(
            f"The recipe {recipe.name!r} gives the decoder 8-bit activations, which go with "
            "8-bit weights alone, so there is nothing to mix. Start from int4."
        )
    if name != DECODER and options.estimate:
        raise InputError(
            f"Only the decoder's losses can be estimated, not those of the {name}. Leave "
            "--estimate out."
        )


def _squared_error(reference: Array, found: Array) -> Array:
    """``||a - b||^2 / ||a||^2`` of one sample, as [1]."""
    size = float(np.square(reference, dtype=np.float64).sum()) or 1.0
    return np.array([np.square(found - reference, dtype=np.float64).sum() / size])
