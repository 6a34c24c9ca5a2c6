"""From a captured graph to the one that is shipped: bind weights, run passes, write files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from mvlm_export.calibration.quantize_graph import GraphQuantization
from mvlm_export.engines.image_processor import ImageProcessorConfig
from mvlm_export.engines.kv_cache import KvForm
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.targets import Target
from mvlm_export.passes.base import PassManager, PassRecord, Verifier
from mvlm_export.passes.graph_io import Progress
from mvlm_export.passes.pipeline import (
    ModelFacts,
    PipelineOptions,
    build_pipeline,
    cache_form,
)
from mvlm_export.passes.verify import IdRange, OrtVerifier

from .geometry import ModelConfig
from .graphs import WeightSource, bind_weights, capture_graph, write_graph

Quantizer = Callable[[str, gs.Graph], GraphQuantization]
"""Chooses integers for a captured graph, by its name; the graph is not changed."""


@dataclass(frozen=True)
class GraphPlan:
    """How the three graphs of one compile are made.

    Attributes:
        dump_dir: gets each graph after each pass; None for no dumps.
        verify: run each graph before and after each pass.
        threads: of ONNX Runtime while verifying.
    """

    config: ModelConfig
    facts: ModelFacts
    target: Target
    options: PipelineOptions
    dump_dir: Path | None = None
    verify: bool = False
    threads: int | None = None

    @property
    def kv_form(self) -> KvForm:
        """Form of the decoder's cache."""
        return cache_form(self.facts, self.target, self.options)

    def verifier(self) -> Verifier | None:
        """What runs the graphs before and after each pass, if that was asked for."""
        if not self.verify:
            return None
        ids = IdRange(self.config.text.vocab_size, rows=True)
        return OrtVerifier({"input_ids": ids}, threads=self.threads)


def model_facts(config: ModelConfig, model: ModelSpec) -> ModelFacts:
    """What the pipelines must know of a model."""
    processor = ImageProcessorConfig.from_json(model.image_processor)
    return ModelFacts(
        vision_layers=config.vision_layers_used,
        keeps_class_token=config.select_feature == "cls_patch",
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        pools=config.pools_average,
        has_peg=config.has_peg,
        ldp_blocks=2 if config.projector_type == "ldpnet" else 0,
        decoder_layers=config.text.num_hidden_layers,
        head_dim=config.text.head_dim,
        positions=config.text.max_position_embeddings,
    )


def export_optimized(
    name: str,
    plan: GraphPlan,
    source: WeightSource,
    folder: Path,
    progress: Progress | None = None,
    quantize: Quantizer | None = None,
) -> tuple[list[PassRecord], GraphQuantization]:
    """Capture a component, run its pipeline, write ``model.onnx`` into ``folder``.

    Args:
        quantize: chooses integers; None leaves the graph in float.

    Returns:
        What the passes did, and what was quantized.

    Raises:
        MvlmError: PyTorch cannot export it, a pass failed or missed what it must do, or the
            file cannot be written.
    """
    graph = bind_weights(capture_graph(name, plan.config), source)
    chosen = GraphQuantization({}, {}) if quantize is None else quantize(name, graph)
    manager = PassManager(
        build_pipeline(
            name, plan.facts, plan.target, plan.options, chosen.steps(), chosen.cache_scales
        ),
        None if plan.dump_dir is None else plan.dump_dir / name,
        plan.verifier(),
    )
    records = manager.run(graph)
    write_graph(graph, folder, progress)
    return records, chosen


def pass_report(records: Sequence[PassRecord]) -> list[dict[str, Any]]:
    """What the manifest keeps of a pipeline's run."""
    return [
        {
            "name": record.name,
            "summary": record.summary,
            "matched": record.result.matched,
            "rewritten": record.result.rewritten,
            "refusals": [
                {"node": refusal.node, "reason": refusal.reason}
                for refusal in record.result.refusals
            ],
            "nodes": [record.before.nodes, record.after.nodes],
            "initializers": [record.before.initializers, record.after.initializers],
            "bytes": [record.before.bytes, record.after.bytes],
            "seconds": record.seconds,
            "change": record.verified,
        }
        for record in records
    ]
