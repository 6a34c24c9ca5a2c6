"""Parity of a bundle's plans, over stand-ins of CUDA and TensorRT."""

import json
import shutil
import sys

import numpy as np
import pytest

from mvlm_export.calibration.data import read_samples
from mvlm_export.engines import trt_session
from mvlm_export.engines.bundle import ENGINES, Bundle
from mvlm_export.engines.errors import EngineError, InputError
from mvlm_export.engines.gpu_probe import GpuInfo
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.compile import CompileResult, compile_checkpoint
from mvlm_export.exporter.parity import ParityCheck
from mvlm_export.exporter.parity_session import SessionForcedDecoder
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import CompileSettings, default_samples
from tests.engines.plans import add_plans, pretend_device

from .conftest import Silent
from .test_parity import Watching, broken_copy, scale_value

BUNDLES = {
    "append": {"jetpack": 6},
    "float32": {"jetpack": 6, "recipe": "fp32"},
    "fixed": {"jetpack": 7},
}
"""Settings of the compile, by what is special of the bundle."""


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """Bundles for Orin as a compile makes them, with stand-ins of their plans."""
    made = {}
    for name, settings in BUNDLES.items():
        output = tmp_path_factory.mktemp("plans") / name
        compile_checkpoint(
            CompileSettings(
                output=output,
                model=checkpoint,
                target="orin",
                parity=False,
                stand_in=False,
                **settings,
            ),
            Silent(),
        )
        made[name] = Bundle.load(add_plans(output), verify=False)
    return made


@pytest.fixture
def device(monkeypatch):
    return pretend_device(monkeypatch)


@pytest.fixture
def check(checkpoint, samples):
    """Makes a check of a bundle."""

    def make(bundle, backend="tensorrt", listener=None, limit=None):
        return ParityCheck(
            bundle,
            ReferenceModel.open(checkpoint),
            read_samples(samples, limit),
            listener or Silent(),
            max_tokens=6,
            threads=1,
            backend=backend,
        )

    return make


@pytest.mark.parametrize("name", BUNDLES)
def test_plans_are_compared_by_the_sessions_that_answer(device, bundles, check, name):
    report = check(bundles[name]).run()
    assert report.passed, report.failures
    assert report.backend == "tensorrt"
    engines = device.trt._engines
    assert len(engines) == 6  # three graphs by themselves, and the three of the runtime
    assert all(context._runs for engine in engines for context in engine._contexts)
    assert bool(device.cuda._launches) == (name == "fixed")
    reference = check(bundles[name], "onnxruntime").run()
    assert len(engines) == 6
    found, expected = report.to_json(), reference.to_json()
    assert (found.pop("backend"), expected.pop("backend")) == ("tensorrt", "onnxruntime")
    assert_close(found, expected)
    assert_close(report.accuracy.to_json(), reference.accuracy.to_json())


def assert_close(found, expected):
    """The same keys, words and counts; figures but for roundings of other kernels."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("graph", "tensor", "change", "blamed"),
    [
        ("vision_encoder", "pre_layrnorm.weight", lambda a: a * 1.01, "vision_encoder"),
        ("projector", "mlp.mlp.2.bias", lambda a: a + 0.05, "projector"),
        ("decoder", "lm_head.weight", lambda a: a * 1.01, "decoder: logits"),
        ("decoder", "model.layers.1.self_attn.q_proj.weight", scale_value, "decoder: cache"),
    ],
)
def test_parity_finds_a_wrong_plan(
    device, bundles, check, tmp_path, graph, tensor, change, blamed
):
    compiled = CompileResult(bundles["float32"], {}, None)
    broken = broken_copy(compiled, tmp_path, graph, tensor, change)
    shutil.rmtree(broken.path / ENGINES)
    bundle = Bundle.load(add_plans(broken.path), verify=False)
    report = check(bundle, limit=1).run()
    assert [part.graph for part in report.graphs if part.failures] == [graph]
    assert any(failure.startswith(blamed) for failure in report.failures), report.failures


def test_one_component_in_memory_at_a_time(device, bundles, check):
    """What a graph held on the device is given back before the next begins."""
    held = {}

    def watch(stage, done):
        blocks = device.cuda._device.blocks.values()
        held.setdefault(stage, []).append(sum(block.nbytes for block in blocks))

    check(bundles["append"], listener=Watching(watch)).run()
    stages = list(held.values())
    assert [sizes[0] for sizes in stages[:2]] == [0, 0]
    for sizes in stages[2:4] + stages[5:]:
        assert sizes[0] == 0
        assert min(sizes[1:]) > 0


def test_a_sequence_leaves_nothing_to_the_next(device, bundles):
    decoder = SessionForcedDecoder(device.open(bundles["fixed"].path).open_decoder())
    ids, embeds = np.array([5, 6, 7], np.int32), np.zeros((1, 64), np.float32)
    with decoder:
        decoder.begin(embeds)
        expected = decoder.step(ids)
        cache = decoder._cache
        cache.write_rows(1, 1, np.full_like(cache.read_rows(1, 1, 2), np.nan))
        assert not np.isfinite(decoder.step(ids[:1]).logits).all()
        decoder.begin(embeds)
        found = decoder.step(ids)
    np.testing.assert_array_equal(found.logits, expected.logits)
    for mine, theirs in zip(found.rows, expected.rows, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_plans_are_compared_where_there_are_some(device, bundles, compiled, check):
    """Threads are PyTorch's too, and choose nothing."""
    assert check(bundles["append"], None)._given.backend_name == "tensorrt"
    assert check(compiled.bundle, None)._given.backend_name == "onnxruntime"


def test_a_backend_that_cannot_run_is_refused_before_any_work(
    device, bundles, compiled, check, monkeypatch
):
    with pytest.raises(InputError, match="for target 'cpu', which has no TensorRT plans"):
        check(compiled.bundle)
    with pytest.raises(InputError, match="no backend 'fast'"):
        check(compiled.bundle, "fast")
    monkeypatch.setattr(trt_session, "probe_gpu", lambda: GpuInfo(None, None, "no driver"))
    with pytest.raises(EngineError, match="plans need a GPU, but there is no driver"):
        check(bundles["append"])


def test_plans_need_no_onnxruntime(device, bundles, check, monkeypatch):
    made = check(bundles["append"], limit=1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # the stand-in has it already
    assert made.run().passed


def type_mvlm(*arguments):
    return run_command(mvlm, [str(argument) for argument in arguments], "mvlm")


def test_nano_as_a_user_types_it(device, tmp_path, capsys):
    output = tmp_path / "nano"
    settings = CompileSettings(output=output, target="orin", parity=False, stand_in=False)
    compile_checkpoint(settings, Silent())
    add_plans(output)
    asked = ("parity", output, "--samples", default_samples(), "--limit", 3, "--threads", 1)
    assert type_mvlm(*asked, "--backend", "tensorrt", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["backend"]) == (True, "tensorrt")
    assert found["end_to_end"]["equal"] + found["end_to_end"]["ties"] == 3
    assert json.loads((output / "report.json").read_text())["parity"]["backend"] == "tensorrt"
    engines = len(device.trt._engines)
    assert type_mvlm(*asked) == 0
    assert "Parity of TensorRT with PyTorch" in capsys.readouterr().out
    assert len(device.trt._engines) == 2 * engines
    assert type_mvlm(*asked, "--backend", "onnxruntime") == 0
    assert "Parity of ONNX Runtime with PyTorch" in capsys.readouterr().out
    assert len(device.trt._engines) == 2 * engines
