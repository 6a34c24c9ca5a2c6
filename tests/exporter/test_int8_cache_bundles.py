"""Bundles with an 8-bit KV cache: compared with PyTorch, and refused where none can be had."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from mvlm_export.calibration.recipe import RECIPES
from mvlm_export.engines.bench import bytes_per_token
from mvlm_export.engines.bundle import PREFIX
from mvlm_export.engines.prefix import load_prefix
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.vlm import VLM
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.export_command import export
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.config import PRESETS
from mvlm_export.exporter.estimate import estimate_model
from mvlm_export.exporter.settings import CompileSettings, default_samples
from tests.ort_versions import NEEDS_INT8_CACHE

from .broken_bundles import change_tensor
from .conftest import Silent

pytestmark = NEEDS_INT8_CACHE


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def coded(request, tmp_path_factory):
    """The nano model with float weights and an int8 cache, ranges from 4 samples."""
    settings = CompileSettings(
        output=tmp_path_factory.mktemp("kv8") / request.param,
        recipe=request.param,
        kv_cache_dtype="int8",
        calib_samples=4,
        threads=1,
    )
    return compile_checkpoint(settings, Silent())


def test_an_onnx_runtime_too_old_to_compare_is_named_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    given = ["--kv-cache-dtype", "int8", "-o", str(tmp_path / "bundle")]
    assert run_command(export, given, "mvlm-export") == 2
    assert "needs ONNX Runtime 1.27 or newer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_agrees_with_pytorch(coded):
    decoder = coded.parity.graphs[-1]
    assert coded.parity.passed, coded.parity.failures
    assert decoder.precision == "int8"
    assert coded.parity.accuracy.precision["decoder"] == "int8"
    assert 1e-9 < decoder.kl_mean < 1e-4
    assert 1e-4 < decoder.cache.relative < 0.05  # floats again, not codes
    assert coded.parity.end_to_end.equal == 7


def test_the_manifest_says_what_a_code_is_worth(coded):
    manifest = coded.bundle.manifest
    assert manifest.recipe in ("fp32-kv8", "fp16-kv8")
    assert manifest.cache_dtype == "int8"
    assert len(manifest.cache_scales) == 2 * manifest.model.num_layers
    assert all(0 < scale < 1 for scale in manifest.cache_scales)
    model = manifest.model
    row = 2 * model.num_layers * model.num_key_value_heads * model.head_dim
    assert bytes_per_token(coded.bundle, 10) - bytes_per_token(coded.bundle, 0) == 10 * row
    estimate = manifest.checks["estimate"]
    assert estimate["cache"] == row * model.max_positions


def test_the_prefix_is_of_codes(coded):
    bundle = coded.bundle
    prefix = load_prefix(bundle.path / PREFIX, bundle.manifest.model, "int8")
    largest = [int(np.abs(rows.astype(int)).max()) for rows in prefix.rows]
    assert all(20 < size <= 128 for size in largest)
    picture = next(default_samples().glob("*.png"))
    answers = [
        VLM.load(bundle.path, threads=1, use_prefix=use).generate(picture, "What is this?")
        for use in (True, False)
    ]
    assert answers[0].ids == answers[1].ids


def test_a_scale_that_clips_is_found(coded, tmp_path, capsys):
    broken = change_tensor(
        coded.bundle,
        tmp_path / "broken",
        "decoder",
        lambda name: name == "present.1.value.scale",
        lambda scale: scale / 16,
    )
    code = run_command(mvlm, ["parity", str(broken.path), "--threads", "1", "--json"], "mvlm")
    output = capsys.readouterr()
    assert code == 1, output.err
    failures = json.loads(output.out)["failures"]
    assert any(text.startswith("decoder: mean KL") for text in failures)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "orin"], "Target 'orin' keeps its KV cache in the graph's floats"),
        (["--target", "cuda"], "Leave the int8 cache out, or compile for cpu"),
        (["--disable-pass", "quantize-kv-cache"], "which is disabled. Leave one of the two"),
        (["--disable-pass", "use-group-query-attention"], "needs ONNX Runtime's GroupQuery"),
    ],
)
def test_where_there_is_none(arguments, complaint, tmp_path, capsys):
    output = tmp_path / "bundle"
    given = ["--kv-cache-dtype", "int8", "-o", str(output), *arguments]
    assert run_command(export, given, "mvlm-export") == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_estimate_counts_its_bytes():
    config, target = PRESETS["v2-1.7b"], get_target("cpu")
    wide = estimate_model("v2-1.7b", config, RECIPES["int4"], target)
    recipe = RECIPES["int4"].with_kv_cache("int8")
    narrow = estimate_model("v2-1.7b", config, recipe, target)
    row = 2 * 24 * 2048
    assert wide.plan.run_bytes - narrow.plan.run_bytes == 3 * row * 2048
    saved = wide.speed.phases[-1].bytes - narrow.speed.phases[-1].bytes
    assert saved == 3 * row * 2048
    assert narrow.recipe == "int4-kv8"
    assert replace(narrow, recipe="int4", plan=wide.plan, speed=wide.speed) == wide
