"""The nano model and its twin with outlier channels: exact graphs, feeds, and what is lost."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from mvlm_export.calibration.data import Sample, read_samples
from mvlm_export.calibration.feeds import append_feeds, decoder_cases, pixel_feeds
from mvlm_export.calibration.quantize_graph import GraphQuantization, Progress, quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import GraphRecipe
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.exporter.assemble import image_processor, model_spec
from mvlm_export.exporter.checkpoint import Checkpoint
from mvlm_export.exporter.config import read_config
from mvlm_export.exporter.graphs import bind_weights
from mvlm_export.exporter.preflight import preflight
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import (
    default_calibration,
    default_samples,
    nano_checkpoint,
)
from mvlm_export.passes.base import PassManager, numpy_dtype
from mvlm_export.passes.deferred import Array
from mvlm_export.passes.graph_io import to_model
from mvlm_export.passes.pipeline import LAST_ROW_PASS, PipelineOptions, exact_steps
from tests.passes.graphs import _captured
from tests.passes.test_pipeline import facts_of

GRAPHS = ("vision_encoder", "projector", "decoder")
FOLDS = frozenset({"fold-rmsnorm-weight", "fold-layernorm-affine"})
"""Passes that take the twin's outlier channels out of the graph."""

Feeds = Sequence[Mapping[str, Array]]


class NanoModel:
    """A checkpoint's graphs, behind their exact rewrites, and inputs for them."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self._checkpoint = Checkpoint.open(folder)
        self._map = preflight(self._checkpoint, self.config).weight_map
        self.reference = ReferenceModel(folder, self._checkpoint, self._map)
        self.tokenizer = LlamaTokenizer.from_folder(folder)
        processor = image_processor(folder, self.config)
        self.spec = model_spec("nano", self.config, processor, "v1")

    def graph(self, name: str, disabled: frozenset[str] = frozenset()) -> gs.Graph:
        """A graph of one's own, logits of every row, weights deferred."""
        return self._exact(name, disabled).copy()

    @functools.cache  # noqa: B019
    def _exact(self, name: str, disabled: frozenset[str]) -> gs.Graph:
        tensors = self._map[name]
        graph = bind_weights(
            _captured(name, self.config), lambda key: self._checkpoint.load(tensors[key])
        )
        options = PipelineOptions("float32", disabled=disabled | {LAST_ROW_PASS})
        PassManager(exact_steps(name, facts_of(self.config), options)).run(graph)
        return graph

    @functools.cache  # noqa: B019
    def feeds(self, name: str, samples: tuple[Sample, ...]) -> Feeds:
        """Inputs of one graph for each sample."""
        if name == "vision_encoder":
            dtype = np.dtype(numpy_dtype(self._exact(name, frozenset()).inputs[0])).name
            return list(pixel_feeds(self.spec, samples, dtype))
        features = [
            self.reference.image_features(feed["pixel_values"])
            for feed in pixel_feeds(self.spec, samples, "float32")
        ]
        if name == "projector":
            return [{"image_features": values} for values in features]
        cases = decoder_cases(self.spec, self.tokenizer, samples)
        rows = [self.reference.image_embeds(values)[0] for values in features]
        return [
            append_feeds(self.spec, case.ids, embeds)
            for case, embeds in zip(cases, rows, strict=True)
        ]


@functools.cache
def nano() -> NanoModel:
    """The trained nano model."""
    return NanoModel(nano_checkpoint())


@functools.cache
def twin() -> NanoModel:
    """The same function with a few channels 20 to 60 times larger."""
    return NanoModel(nano_checkpoint().with_name("nano-outlier"))


@functools.cache
def calibration_samples(count: int) -> tuple[Sample, ...]:
    """The first of the shipped ones."""
    return tuple(read_samples(default_calibration(), count))


@functools.cache
def other_samples() -> tuple[Sample, ...]:
    """Other pictures."""
    return tuple(read_samples(default_samples()))


def quantize(
    model: NanoModel,
    name: str,
    recipe: GraphRecipe,
    folder: Path,
    samples: int = 16,
    disabled: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> GraphQuantization:
    """What becomes of a graph by a recipe."""
    feeds = model.feeds(name, calibration_samples(samples))
    store = WeightStore(folder, {"recipe": str(recipe), "disabled": sorted(disabled)})
    return quantize_graph(
        model.graph(name, disabled), recipe, store, lambda: feeds, 1, progress
    )


def written(graph: gs.Graph, chosen: GraphQuantization) -> gs.Graph:
    """A graph with what was chosen, each step held to its count."""
    PassManager(chosen.steps()).run(graph)
    return graph


def run_exactly(graph: gs.Graph, feeds: Feeds, fused: bool = False) -> list[dict[str, Array]]:
    """Outputs by name for each sample, with activations that the runtime does not round.

    Args:
        fused: let ONNX Runtime use its kernels for integers. Unless it is told not to, it
            rounds the inputs of blocked weights to 8 bits (MatMulNBits), and on processors
            without VNNI sums of two products of 8 by 8 bits saturate at 16 bits.
    """
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if fused else levels.ORT_ENABLE_BASIC
    )
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        to_model(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(one)), strict=True)) for one in feeds]


def logit_loss(graph: gs.Graph, expected: Sequence[Array], feeds: Feeds) -> float:
    """Mean KL, in nats a token, of a decoder from the one that gave ``expected`` logits."""
    found = [outputs["logits"] for outputs in run_exactly(graph, feeds)]
    pairs = zip(found, expected, strict=True)
    return float(np.concatenate([_divergence(a, b) for a, b in pairs]).mean())


def _divergence(found: Array, expected: Array) -> Array:
    logs = [_log_softmax(values.astype(np.float64)) for values in (expected, found)]
    divergence: Array = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)
    return divergence


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normal: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal
