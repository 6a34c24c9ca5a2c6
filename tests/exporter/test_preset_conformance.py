"""Graphs of every published geometry, in every recipe, fit the TensorRT of both JetPacks.

Run by hand: ``pytest -m slow tests/exporter/test_preset_conformance.py``. Only the structure
counts, so weights are never made: where a pass must see values, they are ones.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.quantize_graph import GraphQuantization
from mvlm_export.calibration.quantized_weight import StoredWeight
from mvlm_export.calibration.recipe import RECIPES
from mvlm_export.calibration.smoothing import find_sites
from mvlm_export.calibration.write_quantization import LayerPlan, matrix_shape
from mvlm_export.engines.image_processor import CLIP_MEAN, CLIP_STD
from mvlm_export.engines.targets import get_target
from mvlm_export.exporter.config import parse_config, published_config_json
from mvlm_export.exporter.graphs import bind_weights, capture_graph
from mvlm_export.exporter.models.components import COMPONENTS, build_component
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.graph_io import export_structure
from mvlm_export.passes.pipeline import (
    ModelFacts,
    PipelineOptions,
    build_pipeline,
    exact_steps,
)

pytestmark = pytest.mark.slow

PRESETS = ("v2-1.7b", "v2-3b", "v2-7b")


@dataclass(frozen=True)
class EvenWeight(StoredWeight):
    """A quantized weight that is nowhere: codes of zero, scales of one."""

    def codes(self):
        return np.zeros(self.shape, np.int8)

    def scales(self):
        return np.ones((self.form.groups(self.shape[0]), self.shape[1]), np.float32)


def facts_of(config):
    return ModelFacts(
        vision_layers=config.vision_layers_used,
        keeps_class_token=config.select_feature == "cls_patch",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        pools=config.pools_average,
        has_peg=config.has_peg,
        ldp_blocks=0,
        decoder_layers=config.text.num_hidden_layers,
        head_dim=config.text.head_dim,
        positions=config.text.max_position_embeddings,
    )


@cache
def captured(preset, name):
    """A component's graph and its config; parameters are ones that take no memory."""
    config = parse_config(published_config_json(preset))
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build_component(name, config).state_dict().items()}
    graph = bind_weights(
        capture_graph(name, config), lambda parameter: torch.ones(1).expand(shapes[parameter])
    )
    return config, graph


def plan_of(graph, recipe):
    """The plan that a recipe would come to: every layer it names, in the form it names."""
    plan = {}
    for layer in find_layers(graph):
        form = recipe.form_of(layer.name, layer.kind)
        if form is None or layer.weight is None:
            continue
        shape = matrix_shape(layer)
        weight = EvenWeight(Path("nowhere"), shape, form.for_rows(shape[0]), 0.0)
        scales = (0.05,) * len(layer.inputs) if recipe.activations else ()
        plan[layer.name] = LayerPlan(weight, scales)
    moves = recipe.smooth or "awq" in recipe.method
    sites = find_sites(graph) if moves and plan else []
    factors = {s.name: np.full(s.tensor.shape[-1], 2, np.float32) for s in sites}
    return GraphQuantization(factors, plan)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_recipe_fits_both_jetpacks(preset, name):
    config, graph = captured(preset, name)
    facts = facts_of(config)
    for jetpack in (6, 7):
        target = get_target("orin", jetpack)
        options = PipelineOptions("float16")
        exact = graph.copy()
        PassManager(exact_steps(name, facts, options)).run(exact)
        for recipe in ("fp16", "int8", "int4"):
            chosen = plan_of(exact, RECIPES[recipe].graph(name))
            finished = graph.copy()
            steps = build_pipeline(name, facts, target, options, chosen.steps())
            PassManager(steps).run(finished)
            model = export_structure(finished)
            report = check_conformance(model, target)
            assert report.ok, f"{preset} {name} {recipe} JetPack {jetpack}: {report}"
            assert report.nodes == len(model.graph.node) > 5
            quantized = any(n.op_type == "DequantizeLinear" for n in model.graph.node)
            assert quantized == bool(chosen.plan)
            assert bool(chosen.plan) == (
                recipe == "int8" or (recipe == "int4" and name == "decoder")
            )
