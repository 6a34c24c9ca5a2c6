"""Bundles of integers made from the nano model: they pass, and a wrong scale does not."""

import json

import numpy as np
import onnx
import pytest

from mvlm_export.calibration.data import read_samples
from mvlm_export.engines.bundle import Bundle, read_json
from mvlm_export.exporter.accuracy import measure_accuracy
from mvlm_export.exporter.cli.errors import run_command
from mvlm_export.exporter.cli.main import mvlm
from mvlm_export.exporter.compile import compile_checkpoint
from mvlm_export.exporter.reference import ReferenceModel
from mvlm_export.exporter.settings import CompileSettings, default_samples, nano_checkpoint

from .broken_bundles import change_tensor
from .conftest import Silent

PRECISIONS = {
    "int8": {"vision_encoder": "int8", "projector": "int8", "decoder": "int8"},
    "int4": {"vision_encoder": "float32", "projector": "float32", "decoder": "int4"},
}
FIRST_GATE = "model.layers.0.mlp.gate_proj.weight"
FIRST_FC1 = "encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="session", params=PRECISIONS)
def quantized(request, tmp_path_factory):
    """The nano model by a recipe, chosen on 4 samples and compared on 7."""
    settings = CompileSettings(
        output=tmp_path_factory.mktemp("quantized") / request.param,
        recipe=request.param,
        calib_samples=4,
        threads=1,
    )
    return compile_checkpoint(settings, Silent())


def recipe_of(quantized):
    return quantized.bundle.manifest.recipe


def scales_of(weight):
    return lambda name: name.startswith(weight) and ".scales" in name


def type_parity(capsys, bundle, *arguments):
    code = run_command(mvlm, ["parity", str(bundle.path), *arguments], "mvlm")
    return code, capsys.readouterr()


def test_bundle_passes_its_bounds(quantized):
    parity = quantized.parity
    assert parity.passed, parity.failures
    assert parity.accuracy.precision == PRECISIONS[recipe_of(quantized)]
    assert {part.graph: part.precision for part in parity.graphs} == parity.accuracy.precision
    decoder = parity.graphs[-1]
    assert 0 < decoder.kl_mean < decoder.kl
    assert decoder.values.relative > 1e-3  # integers, not float32 under another name


def test_figures_of_tokens_and_answers(quantized):
    found = quantized.parity.accuracy
    truths = [sample.answer for sample in read_samples(default_samples())]
    assert found.tokens.answers == found.tokens.true_answers == len(truths)
    assert found.answers.samples == len(truths)
    assert found.tokens.tokens > 2 * len(truths)
    assert 0 < found.tokens.kl_mean < found.tokens.kl_p99 <= found.tokens.kl_max
    assert found.tokens.reference_perplexity == pytest.approx(1.0, abs=0.05)
    assert found.tokens.perplexity == pytest.approx(
        found.tokens.reference_perplexity, rel=0.05
    )
    assert found.answers.reference_accuracy == 1.0
    assert set(found.answers.by_kind) == {s.kind for s in read_samples(default_samples())}


def test_report_has_the_figures(quantized):
    report = read_json(quantized.bundle.path / "report.json")
    assert report["accuracy"] == json.loads(json.dumps(quantized.parity.accuracy.to_json()))
    assert report["parity"]["passed"] is True
    assert report["accuracy"]["layers"][0]["sqnr_db"] > 10


def stored_bytes(path):
    """What the file says each initializer takes, there or in the data file."""
    graph = onnx.load(str(path), load_external_data=False).graph
    lengths = []
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        lengths.append(int(entries["length"]) if entries else len(tensor.raw_data))
    assert len(lengths) > 5
    return sum(lengths)


def test_weights_are_counted_by_what_they_hold(quantized):
    """Every stored byte is of some kind; codes take their bits and no more."""
    bundle = quantized.bundle
    codes = recipe_of(quantized)
    held = quantized.parity.accuracy.weight_bytes
    for name, sizes in held.items():
        assert sum(sizes.values()) == stored_bytes(bundle.graph_path(name))
    layers, hidden, inner, vocab = 4, 256, 640, 512
    weights = layers * (4 * hidden**2 + 3 * hidden * inner) + hidden * vocab
    assert held["decoder"][codes] == weights * (1 if codes == "int8" else 0.5)
    assert ("int8" in held["vision_encoder"]) == (codes == "int8")


def test_every_quantized_weight_has_its_noise(quantized):
    noises = quantized.parity.accuracy.layers
    checks = quantized.bundle.manifest.checks["quantization"]
    errors = {
        (graph, name): layer["error"]
        for graph, part in checks.items()
        for name, layer in part["layers"].items()
        if layer["error"] is not None
    }
    assert len(noises) == len(errors) >= 17
    for noise in noises:
        assert 10 ** (noise.sqnr_db / -20) == pytest.approx(errors[noise.graph, noise.layer])
    worst = quantized.parity.accuracy.worst_layers(5)
    assert [noise.sqnr_db for noise in worst] == sorted(n.sqnr_db for n in noises)[:5]


def test_measure_accuracy_alone_gives_the_same(quantized):
    samples = read_samples(default_samples())
    listener = Silent()
    reference = ReferenceModel.open(nano_checkpoint())
    found = measure_accuracy(quantized.bundle, reference, samples, listener, threads=1)
    assert found.to_json() == quantized.parity.accuracy.to_json()
    assert not [title for title in listener.stages if title.startswith("Comparing")]


def test_command_prints_and_keeps_the_figures(quantized, tmp_path, capsys):
    path = tmp_path / "bundle"
    whole = change_tensor(quantized.bundle, path, "decoder", scales_of(FIRST_GATE), np.array)
    code, output = type_parity(capsys, whole, "--limit", "2", "--threads", "1")
    assert code == 0, output.err
    for text in (
        "signal to quantization noise",
        "Weights",
        "perplexity",
        "KL, 99th percentile",
    ):
        assert text in output.out
    code, output = type_parity(capsys, whole, "--limit", "2", "--threads", "1", "--json")
    assert code == 0, output.err
    figures = json.loads(output.out)
    report = read_json(path / "report.json")
    assert report["accuracy"] == figures.pop("accuracy")
    assert report["parity"] == figures
    assert report["settings"]["recipe"] == recipe_of(quantized)


def test_wrong_scales_of_one_layer_fail(quantized, tmp_path, capsys):
    """Scales three times too large in one of the decoder's 17 weights: exit code 1."""
    path = tmp_path / "broken"
    broken = change_tensor(
        quantized.bundle, path, "decoder", scales_of(FIRST_GATE), lambda scales: scales * 3
    )
    code, output = type_parity(capsys, broken, "--threads", "1", "--json")
    assert code == 1
    assert "does not agree with PyTorch" in output.err
    figures = json.loads(output.out)
    assert figures["passed"] is figures["accuracy"]["passed"] is False
    assert any(text.startswith("decoder: mean KL") for text in figures["failures"])
    assert any(text.startswith("accuracy: mean KL") for text in figures["failures"])
    assert read_json(path / "report.json")["accuracy"] == figures["accuracy"]


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)  # int4 leaves the encoder alone
def test_wrong_scales_of_an_encoder_reach_the_answers(quantized, tmp_path):
    """The decoder alone is right, on PyTorch's image rows; on the encoder's own it is not."""
    broken = change_tensor(
        quantized.bundle,
        tmp_path / "broken",
        "vision_encoder",
        scales_of(FIRST_FC1),
        lambda scales: scales * 3,
    )
    reference = ReferenceModel.open(nano_checkpoint())
    samples = read_samples(default_samples())
    found = measure_accuracy(broken, reference, samples, threads=1)
    assert any(text.startswith("mean KL") for text in found.failures)


def test_the_bundle_itself_is_whole(quantized):
    Bundle.load(quantized.bundle.path, verify=True)
