"""The compile pipeline: a checkpoint folder goes in, a bundle comes out."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_export.calibration.quantize_graph import GraphQuantization
from mvlm_export.engines.build import build_engines, build_stand_in
from mvlm_export.engines.bundle import PREFIX, REPORT, Bundle, BundleWriter, write_json
from mvlm_export.engines.doctor import read_memory
from mvlm_export.engines.errors import MissingPackageError
from mvlm_export.engines.kv_cache import cache_names
from mvlm_export.engines.manifest import GraphSpec, Manifest, ModelSpec
from mvlm_export.engines.ort_api import import_onnxruntime
from mvlm_export.engines.ort_releases import (
    require_float16_rounding,
    require_int8_cache,
    require_tensor_scatter,
)
from mvlm_export.engines.plan_profiles import stored_weight_kind
from mvlm_export.engines.prefix import PromptPrefix, save_prefix
from mvlm_export.engines.prompt import get_template, tokenize_constant_prefix
from mvlm_export.engines.trt_api import load_tensorrt
from mvlm_export.engines.trt_profiles import WeightKind
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.lowering.quantize_kv_cache import quantize_rows
from mvlm_export.passes.pipeline import TENSOR_SCATTER_PASS

from .assemble import copy_files, graph_spec, tool_versions
from .compile_inputs import CompileInputs, model_quantizer, read_inputs
from .estimate import Estimate, estimate_target
from .graphs import bind_weights, capture_graph
from .models.components import COMPONENTS
from .optimize import export_optimized, pass_report
from .prefix import compute_prefix
from .preflight import PreflightReport
from .settings import CompileSettings, ResolvedSettings, resolve_settings

if TYPE_CHECKING:
    from .parity import Listener, ParityReport


@dataclass(frozen=True)
class CompileResult:
    """The bundle and what is known of it."""

    bundle: Bundle
    report: dict[str, Any]
    parity: ParityReport | None


class _Stages:
    """A listener that passes on what it is told, and times the stages."""

    def __init__(self, listener: Listener) -> None:
        self.seconds: dict[str, float] = {}
        self._listener = listener
        self._title = ""
        self._started = time.monotonic()

    def stage(self, title: str) -> None:
        self.finish()
        self._title = title
        self._listener.stage(title)

    def advance(self, done: int, total: int, label: str) -> None:
        self._listener.advance(done, total, label)

    def finish(self) -> None:
        now = time.monotonic()
        if self._title:
            self.seconds[self._title] = round(now - self._started, 2)
        self._title, self._started = "", now


class Compiler:
    """One compile; ``run`` does it all."""

    def __init__(self, resolved: ResolvedSettings, listener: Listener) -> None:
        self.resolved = resolved
        self.given = resolved.given
        self.listener = _Stages(listener)

    def run(self) -> CompileResult:
        """Preflight, export, check, build, compare; the bundle appears when all is done.

        Raises:
            MvlmError: what went wrong; nothing half-made is left.
        """
        self.listener.stage("Reading the checkpoint")
        self._check_packages()
        with BundleWriter(self.resolved.output, self.given.overwrite) as writer:
            inputs = read_inputs(
                self.resolved, writer.folder, self.listener, self.resolved.calibrates
            )
            budget = self._meet_budget(inputs)
            passes, quantized = self._export_graphs(writer.folder, inputs)
            cache_scales = _cache_scales(quantized["decoder"], inputs.model)
            self._write_prefix(writer.folder, inputs, cache_scales)
            copy_files(self.resolved.folder, writer.folder)
            graphs = {
                name: graph_spec(writer.folder, name, self.resolved.dtype)
                for name in COMPONENTS
            }
            plans = {name: part.to_json() for name, part in quantized.items() if part.plan}
            noted = {"passes": passes} | ({"quantization": plans} if plans else {})
            checks = self._check_graphs(writer.folder, graphs, inputs, plans) | noted
            self.listener.stage("Hashing the bundle")
            bundle = writer.seal(self._manifest(inputs, graphs, checks, cache_scales))
            report: dict[str, Any] = {
                "settings": self.resolved.to_json(),
                "preflight": _preflight_json(inputs.checked),
                "checks": checks,
                "seconds": self.listener.seconds,
                **budget,
            }
            parity = self._build_and_compare(bundle, inputs, report)
            self.listener.finish()
            write_json(writer.folder / REPORT, report)
            return CompileResult(writer.commit(), report, parity)

    def _check_packages(self) -> None:
        """Packages that are needed later are asked for now."""
        if self.resolved.builds_here:
            load_tensorrt(self.resolved.target.runtime)
        if importlib.util.find_spec("onnxruntime") is not None:
            if self.given.parity or self.given.verify_passes:
                self._check_onnxruntime(import_onnxruntime())
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

    def _check_onnxruntime(self, ort: Any) -> None:  # noqa: ANN401
        """Refuse one that is too old for what is made."""
        recipe = self.resolved.recipe
        if recipe.decoder.kv_cache_dtype is not None:
            require_int8_cache(ort)
        parts = [recipe.graph(name) for name in COMPONENTS]
        quantizes = any(part.activations or part.attention for part in parts)
        if quantizes and self.resolved.dtype == "float16":
            require_float16_rounding(ort)
        scatters = TENSOR_SCATTER_PASS not in self.given.disabled_passes
        if self.resolved.target.scatters_cache and scatters:
            require_tensor_scatter(ort)

    def _meet_budget(self, inputs: CompileInputs) -> dict[str, Any]:
        """Choose the decoder's bits within ``--budget``, and go on with that recipe."""
        if self.resolved.budget is None:
            return {}
        from .sensitivity import SensitivityOptions, recipe_for_budget

        self.listener.stage("Capturing decoder")
        quantizer = model_quantizer(self.resolved, inputs, self.listener)
        assert quantizer is not None
        graph = bind_weights(capture_graph("decoder", inputs.config), inputs.reader("decoder"))
        self.listener.stage("Estimating what each layer loses")
        folder = self._sensitivity_folder
        choice = recipe_for_budget(
            quantizer, graph, self.resolved.budget, SensitivityOptions(estimate=True), folder
        )
        self.resolved = replace(self.resolved, recipe=choice.recipe)
        return {"budget": choice.to_json()}

    @property
    def _sensitivity_folder(self) -> Path:
        """Keeps what was found out about layers until the compile is done."""
        output = self.resolved.output.resolve()
        return output.with_name(f".{output.name}.sensitivity")

    def _export_graphs(
        self, folder: Path, inputs: CompileInputs
    ) -> tuple[dict[str, Any], dict[str, GraphQuantization]]:
        """Write the three graphs; what their passes did and what was quantized, by graph."""
        quantizer = model_quantizer(self.resolved, inputs, self.listener)
        report, quantized = {}, {}
        for name in COMPONENTS:
            self.listener.stage(f"Exporting {name}")
            records, chosen = export_optimized(
                name,
                inputs.plan,
                inputs.reader(name),
                folder / name,
                self.listener.advance,
                None if quantizer is None else quantizer.quantize,
            )
            report[name] = pass_report(records)
            quantized[name] = chosen
        if quantizer is not None:
            quantizer.close()
        shutil.rmtree(self._sensitivity_folder, ignore_errors=True)
        return report, quantized

    def _write_prefix(
        self, folder: Path, inputs: CompileInputs, cache_scales: tuple[float, ...]
    ) -> None:
        """Compute the cache rows that every prompt begins with."""
        template = get_template(inputs.model.template)
        ids = tokenize_constant_prefix(template, inputs.tokenizer)
        if not len(ids):
            return
        self.listener.stage("Computing the prompt's constant prefix")
        rows = compute_prefix(
            ids,
            inputs.config.text,
            inputs.checkpoint,
            inputs.checked.weight_map["decoder"],
            self.resolved.dtype,
            self.listener.advance,
        )
        if cache_scales:
            rows = list(map(quantize_rows, rows, cache_scales))
        save_prefix(folder / PREFIX, PromptPrefix(ids, tuple(rows)))

    def _check_graphs(
        self,
        folder: Path,
        graphs: dict[str, GraphSpec],
        inputs: CompileInputs,
        quantized: dict[str, Any],
    ) -> dict[str, Any]:
        """Conformance, the estimate, and the stand-in build where it applies."""
        target = self.resolved.target
        self.listener.stage(f"Checking the graphs for {target.name}")
        paths = {name: folder / graph.file for name, graph in graphs.items()}
        for index, (name, path) in enumerate(paths.items(), 1):
            check_conformance(path, target).raise_if_failed()
            self.listener.advance(index, len(paths), name)
        estimate = estimate_target(paths, self.resolved.dtype, inputs.model, target)
        checks: dict[str, Any] = {"conformance": "passed", "estimate": estimate.to_json()}
        if target.has_engines and not self.resolved.builds_here and self.given.stand_in:
            layers = quantized.get("decoder", {}).get("layers", {})
            kind = stored_weight_kind(layers, inputs.model.num_layers, self.resolved.dtype)
            checks["stand_in"] = self._stand_in(folder, paths, inputs, estimate, kind)
        return checks

    def _stand_in(
        self,
        folder: Path,
        paths: dict[str, Path],
        inputs: CompileInputs,
        estimate: Estimate,
        kind: WeightKind,
    ) -> dict[str, Any]:
        _, available = read_memory(Path("/"))
        needed = estimate.plan.builder_bytes
        if available is not None and needed > available:
            return {
                "skipped": f"it needs about {needed / 1e9:.1f} GB of memory, of which "
                f"{available / 1e9:.1f} GB are free"
            }
        self.listener.stage("Building with TensorRT-RTX as a stand-in")
        try:
            return build_stand_in(
                paths,
                inputs.model,
                kind,
                folder,
                self.listener.advance,
                inputs.plan.kv_form,
            )
        except MissingPackageError as error:
            return {"skipped": str(error)}

    def _manifest(
        self,
        inputs: CompileInputs,
        graphs: dict[str, GraphSpec],
        checks: dict[str, Any],
        cache_scales: tuple[float, ...],
    ) -> Manifest:
        target = self.resolved.target
        return Manifest(
            model=inputs.model,
            target=target.name,
            jetpack=target.jetpack,
            recipe=self.resolved.recipe.name,
            graphs=graphs,
            kv_form=inputs.plan.kv_form,
            logits_rows=inputs.plan.options.logits_rows,
            cache_scales=cache_scales,
            tools=tool_versions(),
            checks=checks,
            source=inputs.source,
        )

    def _build_and_compare(
        self, bundle: Bundle, inputs: CompileInputs, report: dict[str, Any]
    ) -> ParityReport | None:
        if self.resolved.builds_here:
            self.listener.stage(f"Building engines for {self.resolved.target.name}")
            record = build_engines(bundle, progress=self.listener.advance)
            report["engines"] = {record["folder"]: record}
        if not self.given.parity:
            return None
        from .parity import ParityCheck

        self.listener.stage("Comparing with PyTorch")
        check = ParityCheck(
            bundle,
            inputs.reference(self.resolved.folder),
            inputs.samples,
            self.listener,
            threads=self.given.threads,
            backend="onnxruntime",
        )
        parity = check.run()
        report["parity"] = parity.to_json()
        report["accuracy"] = parity.accuracy.to_json()
        return parity


def _cache_scales(decoder: GraphQuantization, model: ModelSpec) -> tuple[float, ...]:
    """Of an 8-bit cache, in the manifest's order; none for one in float."""
    names = cache_names("present", model.num_layers) if decoder.cache_scales else []
    return tuple(decoder.cache_scales[name] for name in names)


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
