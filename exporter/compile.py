"""The compile pipeline: a checkpoint folder goes in, a bundle comes out."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvlm_export.calibration.data import Sample, choose_samples, read_samples
from mvlm_export.engines.build import build_engines, build_stand_in
from mvlm_export.engines.bundle import PREFIX, REPORT, Bundle, BundleWriter, write_json
from mvlm_export.engines.doctor import read_memory
from mvlm_export.engines.errors import CheckpointError, InputError, MissingPackageError
from mvlm_export.engines.manifest import GraphSpec, Manifest, ModelSpec
from mvlm_export.engines.prefix import PromptPrefix, save_prefix
from mvlm_export.engines.prompt import get_template, tokenize_constant_prefix
from mvlm_export.engines.tokenizer import LlamaTokenizer
from mvlm_export.engines.trt_api import load_tensorrt
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.pipeline import PipelineOptions, require_enabled

from .assemble import (
    checkpoint_source,
    copy_files,
    graph_spec,
    image_processor,
    model_spec,
    tool_versions,
)
from .checkpoint import Checkpoint
from .config import read_config
from .estimate import Estimate, estimate_target
from .geometry import ModelConfig
from .models.components import COMPONENTS
from .optimize import GraphPlan, export_optimized, model_facts, pass_report
from .prefix import compute_prefix
from .preflight import PreflightReport, expected_shapes, preflight, scan_values
from .quantize import CalibrationInputs, ModelQuantizer
from .reference import ReferenceModel
from .settings import CompileSettings, ResolvedSettings, resolve_settings

if TYPE_CHECKING:
    from torch import Tensor

    from .parity import Listener, ParityReport

QUESTION_ROOM = 64
"""Positions that a bundle must leave beside one image: a short question and an answer."""

STAND_IN_MEMORY = 2.5
"""Memory of a TensorRT-RTX build as a multiple of the weights (2.26 was measured)."""


@dataclass(frozen=True)
class CompileResult:
    """The bundle and what is known of it."""

    bundle: Bundle
    report: dict[str, Any]
    parity: ParityReport | None


@dataclass(frozen=True)
class _Inputs:
    """All that is read, and found usable, before anything long."""

    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: LlamaTokenizer
    checked: PreflightReport
    model: ModelSpec
    plan: GraphPlan
    samples: list[Sample]
    calibration: list[Sample]
    source: dict[str, str]


class Compiler:
    """One compile; ``run`` does it all."""

    def __init__(self, resolved: ResolvedSettings, listener: Listener) -> None:
        self.resolved = resolved
        self.given = resolved.given
        self.listener = listener
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._started = time.monotonic()

    def _enter(self, title: str) -> None:
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = round(now - self._started, 2)
        self._stage, self._started = title, now
        if title:
            self.listener.stage(title)

    def run(self) -> CompileResult:
        """Preflight, export, check, build, compare; the bundle appears when all is done.

        Raises:
            MvlmError: what went wrong; nothing half-made is left.
        """
        self._enter("Reading the checkpoint")
        self._check_packages()
        with BundleWriter(self.resolved.output, self.given.overwrite) as writer:
            inputs = self._read_inputs(writer.folder)
            passes, quantized = self._export_graphs(writer.folder, inputs)
            self._write_prefix(writer.folder, inputs)
            copy_files(self.resolved.folder, writer.folder)
            graphs = {
                name: graph_spec(writer.folder, name, self.resolved.dtype)
                for name in COMPONENTS
            }
            checks = self._check_graphs(writer.folder, graphs, inputs) | {"passes": passes}
            if quantized:
                checks["quantization"] = quantized
            self._enter("Hashing the bundle")
            bundle = writer.seal(self._manifest(inputs, graphs, checks))
            report: dict[str, Any] = {
                "settings": self.resolved.to_json(),
                "preflight": _preflight_json(inputs.checked),
                "checks": checks,
                "seconds": self.seconds,
            }
            parity = self._build_and_compare(bundle, inputs, report)
            self._enter("")
            write_json(writer.folder / REPORT, report)
            return CompileResult(writer.commit(), report, parity)

    def _check_packages(self) -> None:
        """Packages that are needed later are asked for now."""
        if self.resolved.builds_here:
            load_tensorrt(self.resolved.target.runtime)
        if importlib.util.find_spec("onnxruntime") is not None:
            return
        if self.given.parity:
            raise MissingPackageError(
                "The comparison with PyTorch runs the graphs in ONNX Runtime, which is not "
                "installed. Install it with `pip install 'mvlm-export[cpu]'`, or leave the "
                "comparison out with --no-parity."
            )
        if self.given.verify_passes:
            raise MissingPackageError(
                "--verify-passes runs the graphs in ONNX Runtime, which is not installed. "
                "Install it with `pip install 'mvlm-export[cpu]'`, or leave it out."
            )

    def _read_inputs(self, output: Path) -> _Inputs:
        folder = self.resolved.folder
        config = self._limited(read_config(folder))
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
        self._enter("Checking every weight")
        scan_values(checkpoint, checked.weight_map, self.listener.advance)
        return _Inputs(
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

    def _limited(self, config: ModelConfig) -> ModelConfig:
        limit, most = self.given.max_length, config.text.max_position_embeddings
        least = config.image_tokens + QUESTION_ROOM
        if most < least:
            raise CheckpointError(
                f"The model has {most} positions (max_position_embeddings), but an image and "
                f"a short question take {least}. Correct config.json."
            )
        if limit is None:
            return config
        if not least <= limit <= most:
            raise InputError(
                f"--max-length {limit} does not fit: this model takes {least} (an image and a "
                f"short question) to {most} positions (max_position_embeddings)."
            )
        return replace(config, text=replace(config.text, max_position_embeddings=limit))

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
        if not self.resolved.recipe.needs_data:
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

    def _export_graphs(
        self, folder: Path, inputs: _Inputs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the three graphs; what their passes did and what was quantized, by graph."""
        quantizer = self._quantizer(inputs)
        report, quantized = {}, {}
        for name in COMPONENTS:
            self._enter(f"Exporting {name}")
            tensors = inputs.checked.weight_map[name]

            def read(parameter: str, tensors: Any = tensors) -> Tensor:  # noqa: ANN401
                return inputs.checkpoint.load(tensors[parameter])

            records, chosen = export_optimized(
                name,
                inputs.plan,
                read,
                folder / name,
                self.listener.advance,
                None if quantizer is None else quantizer.quantize,
            )
            report[name] = pass_report(records)
            if chosen.plan:
                quantized[name] = chosen.to_json()
        if quantizer is not None:
            quantizer.close()
        return report, quantized

    def _quantizer(self, inputs: _Inputs) -> ModelQuantizer | None:
        recipe, output = self.resolved.recipe, self.resolved.output.resolve()
        if recipe.is_float:
            return None
        return ModelQuantizer(
            CalibrationInputs(
                recipe,
                inputs.calibration,
                inputs.source["fingerprint"],
                output.with_name(f".{output.name}.calibration"),
            ),
            inputs.plan,
            inputs.model,
            inputs.tokenizer,
            ReferenceModel(self.resolved.folder, inputs.checkpoint, inputs.checked.weight_map),
            self.listener.advance,
        )

    def _graph_plan(self, config: ModelConfig, model: ModelSpec) -> GraphPlan:
        given = self.given
        options = PipelineOptions(
            self.resolved.dtype,
            frozenset(given.disabled_passes),
            frozenset(given.enabled_passes),
            self.listener.advance,
        )
        facts, target = model_facts(config, model), self.resolved.target
        require_enabled(facts, target, options)
        return GraphPlan(
            config,
            facts,
            target,
            options,
            given.dump_dir,
            given.verify_passes,
            given.threads,
        )

    def _write_prefix(self, folder: Path, inputs: _Inputs) -> None:
        """Compute the cache rows that every prompt begins with."""
        template = get_template(inputs.model.template)
        ids = tokenize_constant_prefix(template, inputs.tokenizer)
        if not len(ids):
            return
        self._enter("Computing the prompt's constant prefix")
        rows = compute_prefix(
            ids,
            inputs.config.text,
            inputs.checkpoint,
            inputs.checked.weight_map["decoder"],
            self.resolved.dtype,
            self.listener.advance,
        )
        save_prefix(folder / PREFIX, PromptPrefix(ids, tuple(rows)))

    def _check_graphs(
        self, folder: Path, graphs: dict[str, GraphSpec], inputs: _Inputs
    ) -> dict[str, Any]:
        """Conformance, the estimate, and the stand-in build where it applies."""
        target = self.resolved.target
        self._enter(f"Checking the graphs for {target.name}")
        paths = {name: folder / graph.file for name, graph in graphs.items()}
        for index, (name, path) in enumerate(paths.items(), 1):
            check_conformance(path, target).raise_if_failed()
            self.listener.advance(index, len(paths), name)
        estimate = estimate_target(paths, self.resolved.dtype, inputs.model, target)
        checks: dict[str, Any] = {"conformance": "passed", "estimate": estimate.to_json()}
        if target.has_engines and not self.resolved.builds_here and self.given.stand_in:
            checks["stand_in"] = self._stand_in(folder, paths, inputs, estimate)
        return checks

    def _stand_in(
        self, folder: Path, paths: dict[str, Path], inputs: _Inputs, estimate: Estimate
    ) -> dict[str, Any]:
        _, available = read_memory(Path("/"))
        needed = STAND_IN_MEMORY * estimate.weights
        if available is not None and needed > available:
            return {
                "skipped": f"it needs about {needed / 1e9:.0f} GB of memory, of which "
                f"{available / 1e9:.0f} GB are free"
            }
        self._enter("Building with TensorRT-RTX as a stand-in")
        try:
            return build_stand_in(
                paths,
                inputs.model,
                self.resolved.dtype,
                folder,
                self.listener.advance,
                inputs.plan.kv_form,
            )
        except MissingPackageError as error:
            return {"skipped": str(error)}

    def _manifest(
        self,
        inputs: _Inputs,
        graphs: dict[str, GraphSpec],
        checks: dict[str, Any],
    ) -> Manifest:
        target = self.resolved.target
        return Manifest(
            model=inputs.model,
            target=target.name,
            jetpack=target.jetpack,
            recipe=self.resolved.recipe.name,
            graphs=graphs,
            kv_form=inputs.plan.kv_form,
            tools=tool_versions(),
            checks=checks,
            source=inputs.source,
        )

    def _build_and_compare(
        self, bundle: Bundle, inputs: _Inputs, report: dict[str, Any]
    ) -> ParityReport | None:
        if self.resolved.builds_here:
            self._enter(f"Building engines for {self.resolved.target.name}")
            record = build_engines(bundle, progress=self.listener.advance)
            report["engines"] = {record["folder"]: record}
        if not self.given.parity:
            return None
        from .parity import ParityCheck

        self._enter("Comparing with PyTorch")
        reference = ReferenceModel(
            self.resolved.folder, inputs.checkpoint, inputs.checked.weight_map
        )
        check = ParityCheck(
            bundle, reference, inputs.samples, self.listener, threads=self.given.threads
        )
        parity = check.run()
        report["parity"] = parity.to_json()
        report["accuracy"] = parity.accuracy.to_json()
        return parity


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


def _preflight_json(checked: PreflightReport) -> dict[str, Any]:
    used = {name: len(names) for name, names in checked.weight_map.items()}
    return {
        "used": used,
        "ignored": dict(checked.ignored),
        "unknown": list(checked.unknown),
        "notes": list(checked.notes),
    }


def compile_checkpoint(settings: CompileSettings, listener: Listener) -> CompileResult:
    """Compile a checkpoint into a bundle.

    Raises:
        MvlmError: bad input, or a graph the target refuses; the message says what to do.
    """
    return Compiler(resolve_settings(settings), listener).run()
