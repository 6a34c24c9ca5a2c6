import json
import shutil

import onnx
import pytest
from safetensors.torch import load_file, save_file

from mvlm_export.engines import build as building
from mvlm_export.engines.build import build_engines
from mvlm_export.engines.bundle import Bundle
from mvlm_export.engines.errors import (
    CheckpointError,
    EngineError,
    InputError,
    MissingPackageError,
)
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter import compile as compiling
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.settings import CompileSettings

from ..helpers_plan import plan_kernels
from .conftest import Silent


def test_bundle_is_whole(compiled):
    bundle = Bundle.load(compiled.bundle.path)
    assert bundle.manifest == compiled.bundle.manifest
    on_disk = {
        path.relative_to(bundle.path).as_posix()
        for path in bundle.path.rglob("*")
        if path.is_file()
    }
    assert on_disk == {*bundle.manifest.files, "manifest.json", "report.json"}
    for name in ("vision_encoder", "projector", "decoder"):
        assert {f"{name}/model.onnx", f"{name}/model.onnx.data"} <= on_disk
    assert {"tokenizer/tokenizer.model", "config.json", "report.json"} <= on_disk


def test_manifest_states_the_contracts(compiled):
    manifest = compiled.bundle.manifest
    assert (manifest.target, manifest.recipe, manifest.kv_form) == ("cpu", "fp32", "fixed")
    decoder = manifest.graphs["decoder"]
    shapes = {tensor.name: tensor.shape for tensor in decoder.inputs}
    assert shapes["input_ids"] == ("S",)
    assert shapes["past_length"] == (1,)
    assert shapes["past_key_values.0.key"] == (1, 4, 256, 16)
    (pixels,) = manifest.graphs["vision_encoder"].inputs
    assert pixels.dtype == "uint8"
    outputs = {tensor.name: tensor.shape for tensor in decoder.outputs}
    assert (outputs["logits"], outputs["next_token"]) == (("R", 512), ("R",))
    assert manifest.logits_rows == 8
    assert manifest.model.image_tokens == 4
    assert manifest.model.stop_ids == (2,)
    assert manifest.tools["onnx"] == onnx.__version__


def test_parity_passes_and_is_reported(compiled):
    assert compiled.parity is not None
    assert compiled.parity.passed, compiled.parity.failures
    report = json.loads((compiled.bundle.path / "report.json").read_text())
    assert report["parity"]["passed"] is True
    assert [graph["graph"] for graph in report["parity"]["graphs"]] == [
        "vision_encoder",
        "projector",
        "decoder",
    ]
    answers = report["parity"]["end_to_end"]
    assert answers["equal"] + answers["ties"] == answers["samples"] == 2
    assert report["preflight"]["ignored"]
    assert report["settings"]["recipe"] == "fp32"
    assert "Exporting decoder" in report["seconds"]


def test_runtime_answers_from_the_bundle(compiled, samples):
    vlm = VLM.load(compiled.bundle.path, threads=1)
    answer = vlm.generate(samples / "0.png", "what is this?", max_tokens=5)
    assert len(answer.ids) <= 5
    assert answer.timings.prefill_tokens > compiled.bundle.manifest.model.image_tokens


def settings_for(tmp_path, checkpoint, samples, **changes):
    return CompileSettings(
        **{
            "output": tmp_path / "bundle",
            "model": checkpoint,
            "samples": samples,
            "threads": 1,
            **changes,
        }
    )


def test_orin_bundle_on_a_host(checkpoint, samples, tmp_path):
    listener = Silent()
    settings = settings_for(tmp_path, checkpoint, samples, target="orin")
    result = compile_checkpoint(settings, listener)
    assert result.parity is not None
    assert result.parity.passed
    manifest = result.bundle.manifest
    assert (manifest.target, manifest.jetpack, manifest.recipe) == ("orin", 6, "fp16")
    assert result.bundle.engines() == {}
    stand_in = result.report["checks"]["stand_in"]
    assert set(stand_in) == {"vision_encoder", "projector", "decoder"}
    assert all(plan["plan_bytes"] > 0 for plan in stand_in.values())
    assert stand_in["decoder"]["compute_capability"] == [8, 6]
    estimate = result.report["checks"]["estimate"]
    assert estimate["fits"] is True
    per_second = 0.65 * 204.8e9 / estimate["read_per_token"]
    assert estimate["tokens_per_second"] == pytest.approx(per_second)


def test_rtx_leaves_three_plans(checkpoint, samples, tmp_path):
    settings = settings_for(tmp_path, checkpoint, samples, target="rtx", parity=False)
    result = compile_checkpoint(settings, Silent())
    bundle = Bundle.load(result.bundle.path)
    ((key, record),) = bundle.engines().items()
    assert key.startswith("rtx-trt1.7")
    plans = record["plans"]
    for name, plan in plans.items():
        path = bundle.path / "engines" / key / f"{name}.plan"
        assert path.stat().st_size == plan["plan_bytes"] > 100_000
        assert plan["sources"] == {
            file: digest
            for file, digest in bundle.manifest.files.items()
            if file.startswith(f"{name}/")
        }
    profiles = {profile["name"]: profile["dims"] for profile in plans["decoder"]["profiles"]}
    assert list(profiles) == ["prefill", "decode"]
    assert profiles["prefill"]["I"] == [1, 4, 16]
    assert one_attention_kernel_a_layer(bundle, key) == {"vision_encoder": 2, "decoder": 4}


def one_attention_kernel_a_layer(bundle, key):
    """Fused attention kernels in the plans' text: layers, times the decoder's two profiles."""
    folder = bundle.path / "engines" / key
    return {
        name: sum(
            "mha" in entry.kernel
            for entry in plan_kernels((folder / f"{name}.plan").read_bytes())
        )
        for name in ("vision_encoder", "decoder")
    }


def test_plans_are_built_again_in_their_place(checkpoint, samples, tmp_path):
    settings = settings_for(tmp_path, checkpoint, samples, target="rtx", parity=False)
    bundle = compile_checkpoint(settings, Silent()).bundle
    (key,) = bundle.engines()
    (bundle.path / "engines" / key / "stale").write_text("from an older build")
    record = build_engines(bundle)
    assert record["folder"] == key
    assert Bundle.load(bundle.path).engines()[key] == record
    assert not (bundle.path / "engines" / key / "stale").exists()
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [key]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, EngineError("no")])
def test_a_failed_build_keeps_the_old_plans(
    checkpoint, samples, tmp_path, monkeypatch, failure
):
    settings = settings_for(tmp_path, checkpoint, samples, target="rtx", parity=False)
    bundle = compile_checkpoint(settings, Silent()).bundle
    before = bundle.engines()
    real = building.build_engine

    def fail_at_decoder(path, *rest, **options):
        if path.parent.name == "decoder":
            raise failure
        return real(path, *rest, **options)

    monkeypatch.setattr(building, "build_engine", fail_at_decoder)
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        build_engines(bundle)
    assert Bundle.load(bundle.path).engines() == before
    assert [path.name for path in (bundle.path / "engines").iterdir()] == list(before)


def test_a_missing_package_is_found_before_anything_is_written(
    checkpoint, samples, tmp_path, monkeypatch
):
    def no_tensorrt(kind):
        raise MissingPackageError(f"{kind} is not installed")

    monkeypatch.setattr(compiling, "load_tensorrt", no_tensorrt)
    listener = Silent()
    with pytest.raises(MissingPackageError):
        compile_checkpoint(settings_for(tmp_path, checkpoint, samples, target="rtx"), listener)
    assert listener.stages == ["Reading the checkpoint"]
    assert list(tmp_path.iterdir()) == []


def test_a_stand_in_that_does_not_fit_is_skipped(checkpoint, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "read_memory", lambda root: (1000, 1000))
    settings = settings_for(tmp_path, checkpoint, samples, target="orin", parity=False)
    result = compile_checkpoint(settings, Silent())
    assert "GB of memory" in result.report["checks"]["stand_in"]["skipped"]


def test_a_full_disk_is_found_before_the_export(checkpoint, samples, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(compiling.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="Free some space"):
        compile_checkpoint(settings_for(tmp_path, checkpoint, samples), Silent())
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_named_and_kept(checkpoint, samples, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    tensors = {
        k: v.clone().float() for k, v in load_file(folder / "model.safetensors").items()
    }
    tensors["lm_head.weight"][0, 0] = 1e6
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    settings = settings_for(tmp_path, folder, samples, recipe="fp16", parity=False)
    result = compile_checkpoint(settings, Silent())
    records = {r["name"]: r for r in result.bundle.manifest.checks["passes"]["decoder"]}
    (refusal,) = records["convert-to-float16"]["refusals"]
    assert "lm_head.weight" in refusal["reason"]
    model = onnx.load(str(result.bundle.graph_path("decoder")), load_external_data=False)
    dtypes = {t.name: t.data_type for t in model.graph.initializer if len(t.dims) == 2}
    kept = {name for name, dtype in dtypes.items() if dtype == onnx.TensorProto.FLOAT}
    assert len(kept) == 1
    assert "lm_head.weight" in kept.pop()


def test_max_length_shortens_the_tables(checkpoint, samples, tmp_path):
    settings = settings_for(tmp_path, checkpoint, samples, max_length=100, parity=False)
    result = compile_checkpoint(settings, Silent())
    assert result.bundle.manifest.model.max_positions == 100
    model = onnx.load(str(result.bundle.graph_path("decoder")), load_external_data=False)
    caches = {v.name: v.type.tensor_type.shape for v in model.graph.input}
    assert caches["past_key_values.0.key"].dim[2].dim_value == 100
    shapes = [list(t.dims) for t in model.graph.initializer]
    assert shapes.count([100, 8]) == 2, "half-width tables of cosines and sines"


@pytest.mark.parametrize("length", [10, 10_000])
def test_max_length_that_does_not_fit(checkpoint, samples, tmp_path, length):
    with pytest.raises(InputError, match=f"--max-length {length}"):
        compile_checkpoint(
            settings_for(tmp_path, checkpoint, samples, max_length=length), Silent()
        )


@pytest.mark.parametrize("failure", [KeyboardInterrupt, CheckpointError("broken weight")])
def test_failure_in_the_middle_leaves_nothing(
    checkpoint, samples, tmp_path, monkeypatch, failure
):
    real = compiling.export_optimized

    def fail_at_projector(name, *rest):
        if name == "projector":
            raise failure
        return real(name, *rest)

    monkeypatch.setattr(compiling, "export_optimized", fail_at_projector)
    kind = failure if isinstance(failure, type) else type(failure)
    with pytest.raises(kind):
        compile_checkpoint(settings_for(tmp_path, checkpoint, samples), Silent())
    assert list(tmp_path.iterdir()) == []
