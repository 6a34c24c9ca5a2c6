"""All that a compile reads, found usable before anything long begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mvlm_export.calibration.data import Sample, choose_samples, read_samples
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.manifest import ModelSpec
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.passes.pipeline import PipelineOptions, require_enabled, require_kv_cache

from .assemble import checkpoint_source, image_processor, model_spec
from .checkpoint import Checkpoint
from .config import read_config
from .geometry import ModelConfig
from .optimize import GraphPlan, model_facts
from .preflight import PreflightReport, expected_shapes, preflight, scan_values
from .quantize import CalibrationInputs, ModelQuantizer
from .reference import ReferenceModel
from .settings import ResolvedSettings

if TYPE_CHECKING:
    from torch import Tensor

    from .parity import Listener


@dataclass(frozen=True)
class CompileInputs:
    """What :func:`read_inputs` gives.

    Attributes:
        checked: where each parameter lies, and what the checkpoint holds beside them.
        plan: how graphs are made.
        samples: to compare with PyTorch on; empty without the comparison.
        calibration: what integers are chosen on; empty where none are needed.
        source: names the checkpoint and its content.
    """

    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: LlamaTokenizer
    checked: PreflightReport
    model: ModelSpec
    plan: GraphPlan
    samples: list[Sample]
    calibration: list[Sample]
    source: dict[str, str]

    def reader(self, graph: str) -> Callable[[str], Tensor]:
        """Gives a parameter of one graph by its name there."""
        tensors = self.checked.weight_map[graph]
        return lambda parameter: self.checkpoint.load(tensors[parameter])

    def reference(self, folder: Path) -> ReferenceModel:
        """The model in PyTorch, of the checkpoint in ``folder``."""
        return ReferenceModel(folder, self.checkpoint, self.checked.weight_map)


def read_inputs(
    resolved: ResolvedSettings, output: Path, listener: Listener, calibrates: bool
) -> CompileInputs:
    """Read a checkpoint and samples, and find faults before anything long begins.

    Args:
        output: folder on the disk that the bundle goes to.
        calibrates: whether the samples that integers are chosen on are needed.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        InputError: samples or settings that cannot be used, or too little room on the disk.
    """
    return _Reader(resolved, listener, calibrates).read(output)


def model_quantizer(
    resolved: ResolvedSettings, inputs: CompileInputs, listener: Listener
) -> ModelQuantizer | None:
    """What quantizes the graphs; None where the recipe leaves all in float.

    Finished weights are kept beside the output until the compile is done.
    """
    if resolved.recipe.is_float:
        return None
    output = resolved.output.resolve()
    given = CalibrationInputs(
        resolved.recipe,
        inputs.calibration,
        inputs.source["fingerprint"],
        output.with_name(f".{output.name}.calibration"),
    )
    reference = inputs.reference(resolved.folder)
    return ModelQuantizer(
        given, inputs.plan, inputs.model, inputs.tokenizer, reference, listener.advance
    )


class _Reader:
    def __init__(
        self, resolved: ResolvedSettings, listener: Listener, calibrates: bool
    ) -> None:
        self.resolved = resolved
        self.given = resolved.given
        self.listener = listener
        self.calibrates = calibrates

    def read(self, output: Path) -> CompileInputs:
        folder = self.resolved.folder
        config = read_config(folder).limited(self.given.max_length)
        checkpoint = Checkpoint.open(folder)
        tokenizer = LlamaTokenizer.from_folder(folder)
        checked = preflight(
            checkpoint,
            config,
            tokenizer.vocab_size,
            allow_unknown=self.given.allow_unknown,
        )
        checked.raise_if_failed()
        processor = image_processor(folder, config)
        model = model_spec(folder.name, config, processor, self.given.template)
        plan = self._graph_plan(config, model)
        samples = self._read_samples(model, tokenizer)
        calibration = self._read_calibration(model, tokenizer)
        self._check_disk(output, config)
        self.listener.stage("Checking every weight")
        scan_values(checkpoint, checked.weight_map, self.listener.advance)
        return CompileInputs(
            config,
            checkpoint,
            tokenizer,
            checked,
            model,
            plan,
            samples,
            calibration,
            checkpoint_source(checkpoint),
        )

    def _read_samples(self, model: ModelSpec, tokenizer: LlamaTokenizer) -> list[Sample]:
        """The samples, each made ready once so that one that cannot be used is named now."""
        if not self.given.parity:
            return []
        from .parity_cases import prepare_cases

        samples = read_samples(self.resolved.samples)
        prepare_cases(model, tokenizer, samples, 1, model.max_positions)
        return samples

    def _read_calibration(self, model: ModelSpec, tokenizer: LlamaTokenizer) -> list[Sample]:
        """The samples that integers are chosen on; each is made ready once, as above."""
        if not self.calibrates:
            return []
        from .parity_cases import prepare_cases

        samples = read_samples(self.resolved.calib_data)
        chosen = choose_samples(samples, self.given.calib_samples)
        prepare_cases(model, tokenizer, chosen, 1, model.max_positions)
        return chosen

    def _check_disk(self, output: Path, config: ModelConfig) -> None:
        needed = _weight_count(config) * np.dtype(self.resolved.dtype).itemsize
        if self.resolved.target.has_engines:
            needed *= 2  # the plans, the target's or the stand-in's, hold the weights again
        free = shutil.disk_usage(output).free
        if needed * 1.05 > free:
            raise InputError(
                f"The bundle takes about {needed / 1e9:.1f} GB, and the disk of "
                f"{self.resolved.output} has {free / 1e9:.1f} GB free. Free some space or "
                "choose another --output."
            )

    def _graph_plan(self, config: ModelConfig, model: ModelSpec) -> GraphPlan:
        given = self.given
        options = PipelineOptions(
            self.resolved.dtype,
            frozenset(given.disabled_passes),
            frozenset(given.enabled_passes),
            self.listener.advance,
            self.resolved.target.logits_rows,
        )
        facts, target = model_facts(config, model), self.resolved.target
        require_enabled(facts, target, options)
        kv_cache_dtype = self.resolved.recipe.decoder.kv_cache_dtype
        if kv_cache_dtype is not None:
            require_kv_cache(kv_cache_dtype, facts, target, options)
        return GraphPlan(
            config,
            facts,
            target,
            options,
            given.dump_dir,
            given.verify_passes,
            given.threads,
        )


def _weight_count(config: ModelConfig) -> int:
    """Scalar parameters of the three components; a tied head is written twice."""
    count = config.text.vocab_size * config.text.hidden_size
    total = count if config.text.tie_word_embeddings else 0
    for shapes in expected_shapes(config).values():
        for shape in shapes.values():
            size = 1
            for axis in shape:
                size *= axis
            total += size
    return total
