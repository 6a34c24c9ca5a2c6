"""Precisions, bounds and figures of the accuracy report, on records made up by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper

from mvlm_export.engines.errors import BundleError
from mvlm_export.exporter.accuracy_report import (
    AccuracyReport,
    ExactAnswers,
    ForcedScores,
    LayerNoise,
    TokenAccuracy,
    find_failures,
)
from mvlm_export.exporter.accuracy_weights import decibels, layer_noise, weight_bytes
from mvlm_export.exporter.tolerances import (
    TOLERANCES,
    coarsest_precision,
    precision_of,
)
from tests.engines.manifests import tiny_manifest

TOKENS = TokenAccuracy(
    tokens=100,
    answers=20,
    true_answers=20,
    kl_mean=1e-9,
    kl_p99=1e-8,
    kl_max=1e-7,
    top1=1.0,
    perplexity=1.1,
    reference_perplexity=1.1,
)


def quantized_manifest(**forms):
    """Each graph's layers as the compile notes them: form, or None for activations alone."""
    checks = {
        graph: {
            "layers": {
                f"layer.{n}": {"form": form, "error": None if form is None else 0.1}
                for n, form in enumerate(kinds)
            }
        }
        for graph, kinds in forms.items()
    }
    return replace(tiny_manifest(), checks={"quantization": checks})


@pytest.mark.parametrize(
    ("forms", "precision"),
    [
        (["int8", "int8"], "int8"),
        (["int8", "int4 g128", None], "int4"),
        (["int4 g32 asym"], "int4"),
        ([None], "int8"),
        ([], "float32"),
    ],
)
def test_precision_is_that_of_the_coarsest_layer(forms, precision):
    manifest = quantized_manifest(decoder=forms)
    assert precision_of(manifest, "decoder") == precision
    assert precision_of(manifest, "projector") == manifest.graphs["projector"].dtype
    assert precision_of(tiny_manifest(), "decoder") == "float32"


def test_answers_have_the_precision_of_the_coarsest_graph():
    assert coarsest_precision(tiny_manifest()) == "float32"
    assert coarsest_precision(quantized_manifest(vision_encoder=["int8"])) == "int8"
    both = quantized_manifest(vision_encoder=["int8"], decoder=["int4 g128"])
    assert coarsest_precision(both) == "int4"


def test_bounds_widen_from_precision_to_precision():
    assert list(TOLERANCES) == ["float32", "float16", "int8", "int4"]
    for finer, coarser in zip(
        list(TOLERANCES.values()), list(TOLERANCES.values())[1:], strict=False
    ):
        assert finer.relative < coarser.relative < 1
        assert finer.cosine > coarser.cosine > 0.9
        assert finer.kl_mean < coarser.kl_mean
        assert finer.top1 >= coarser.top1
        assert finer.drop <= coarser.drop


@pytest.mark.parametrize("precision", TOLERANCES)
def test_mean_divergence_and_agreement_are_bounded(precision):
    bound, answers = TOLERANCES[precision], ExactAnswers(20, 1.0, 1.0)
    assert find_failures(TOKENS, answers, bound) == []
    far = replace(TOKENS, kl_mean=1.01 * bound.kl_mean)
    (text,) = find_failures(far, answers, bound)
    assert text.startswith("mean KL")
    (text,) = find_failures(replace(TOKENS, top1=bound.top1 - 1e-3), answers, bound)
    assert text.startswith("top-1")
    nothing = replace(TOKENS, kl_mean=math.nan, top1=math.nan)
    assert len(find_failures(nothing, answers, bound)) == 2


@pytest.mark.parametrize(
    ("samples", "lost", "fails"),
    [
        (7, 2, False),  # 5 points lose 2 of 7 in 4 of 100 draws
        (7, 3, True),
        (100, 11, False),
        (100, 12, True),
        (2000, 122, False),
        (2000, 126, True),
        (2000, -50, False),
        (0, 0, False),
    ],
)
def test_lost_answers_fail_beyond_chance(samples, lost, fails):
    reference = 0.9
    accuracy = reference - lost / samples if samples else None
    answers = ExactAnswers(samples, accuracy, reference if samples else None)
    assert answers.lost == lost
    for precision in ("int8", "int4"):
        failures = find_failures(TOKENS, answers, TOLERANCES[precision])
        assert bool(failures) == fails
    for precision in ("float32", "float16"):  # each answer is held to PyTorch's there
        assert find_failures(TOKENS, answers, TOLERANCES[precision]) == []


def test_chance_is_what_it_says():
    """A bundle that truly loses 5 points fails about once in a hundred draws, not more."""
    lost = np.random.default_rng(0).binomial(200, 0.05, 4000)
    bound = TOLERANCES["int8"]
    failed = [
        bool(find_failures(TOKENS, ExactAnswers(200, 1 - n / 200, 1.0), bound)) for n in lost
    ]
    assert 0.002 < np.mean(failed) < 0.015


def test_scores_by_hand():
    """Two tokens of a true answer and one of PyTorch's own, over two candidates."""
    scores = ForcedScores(tie=0.01)
    half, sure = np.log([0.5, 0.5]), np.log([0.9, 0.1])
    scores.add(np.array([half, sure]), np.array([sure, sure]), [0, 0], known=True)
    scores.add(np.array([sure[::-1]]), np.array([sure]), [0], known=False)
    found = scores.figures()
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    last = 0.9 * math.log(0.9 / 0.1) + 0.1 * math.log(0.1 / 0.9)
    assert (found.tokens, found.answers, found.true_answers) == (3, 2, 1)
    assert found.kl_mean == pytest.approx((first + last) / 3)
    assert found.kl_max == found.kl_p99 == pytest.approx(last)
    assert found.top1 == pytest.approx(2 / 3)  # of two equal candidates the first is best
    assert found.perplexity == pytest.approx((0.5 * 0.9) ** -0.5)
    assert found.reference_perplexity == pytest.approx(1 / 0.9)


def test_scores_without_true_answers_and_without_numbers():
    scores = ForcedScores(tie=0.01)
    rows = np.zeros((2, 3))
    scores.add(np.full((2, 3), np.nan), rows, [0, 1], known=False)
    found = scores.figures()
    assert (found.perplexity, found.reference_perplexity) == (None, None)
    assert (found.kl_mean, found.kl_p99, found.top1) == (math.inf, math.inf, 0.0)
    scores.add(np.full((2, 3), np.nan), rows, [0, 1], known=True)
    found = scores.figures()
    assert found.perplexity == math.inf
    assert found.reference_perplexity == pytest.approx(3.0)


def test_decibels():
    assert decibels(0.1) == pytest.approx(20.0)
    assert decibels(2**-7) == pytest.approx(42.14, abs=0.01)
    assert decibels(0.0) == math.inf


def test_noise_of_layers_that_hold_a_weight():
    manifest = quantized_manifest(vision_encoder=["int8", None], decoder=["int4 g128"])
    noises = layer_noise(manifest)
    assert [(n.graph, n.layer, n.form) for n in noises] == [
        ("vision_encoder", "layer.0", "int8"),
        ("decoder", "layer.0", "int4 g128"),
    ]
    assert layer_noise(tiny_manifest()) == []


def test_worst_layers_come_first():
    noises = [LayerNoise("decoder", str(n), "int8", db) for n, db in enumerate([30, 10, 20])]
    report = AccuracyReport({"decoder": "int8"}, {}, noises, TOKENS, ExactAnswers(0), [])
    assert [noise.sqnr_db for noise in report.worst_layers(2)] == [10, 20]
    assert report.is_quantized
    assert report.to_json()["layers"][1]["sqnr_db"] == 10


def write_graph(path, dtype=TensorProto.INT4):
    """int8 codes, 4-bit codes, packed codes, activations on a grid, and plain floats."""
    constants = [
        helper.make_tensor("codes8", TensorProto.INT8, [4, 6], [0] * 24),
        helper.make_tensor("scales8", TensorProto.FLOAT16, [6], [1.0] * 6),
        helper.make_tensor("codes4", dtype, [3, 5], [0] * 15),
        helper.make_tensor("scales4", TensorProto.FLOAT, [1, 5], [1.0] * 5),
        helper.make_tensor("rows8", TensorProto.INT8, [7, 4], [0] * 28),
        helper.make_tensor("scales_of_rows", TensorProto.FLOAT16, [7], [1.0] * 7),
        helper.make_tensor("rows4", dtype, [2, 32], [0] * 64),
        helper.make_tensor("scales_of_blocks", TensorProto.FLOAT16, [2, 2], [1.0] * 4),
        helper.make_tensor("packed", TensorProto.UINT8, [6, 2, 16], [0] * 192),
        helper.make_tensor("table", TensorProto.FLOAT, [6, 2], [1.0] * 12),
        helper.make_tensor("step", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("zero", TensorProto.INT8, [], [0]),
        helper.make_tensor("bias", TensorProto.FLOAT16, [6], [0.0] * 6),
        helper.make_tensor("shape", TensorProto.INT64, [2], [1, 1]),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["codes8", "scales8"], ["a"], axis=1),
        helper.make_node(
            "DequantizeLinear", ["codes4", "scales4"], ["b"], axis=0, block_size=32
        ),
        helper.make_node(
            "MatMulNBits", ["x", "packed", "table"], ["c"], domain="com.microsoft", bits=4
        ),
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["d"]),
        helper.make_node("Gather", ["rows8", "ids"], ["e"]),
        helper.make_node("Gather", ["scales_of_rows", "ids"], ["f"]),
        helper.make_node("DequantizeLinear", ["e", "f"], ["g"], axis=0),
        helper.make_node(
            "GatherBlockQuantized",
            ["rows4", "ids", "scales_of_blocks"],
            ["h"],
            domain="com.microsoft",
            bits=4,
        ),
    ]
    graph = helper.make_graph(nodes, "weights", [], [], constants)
    path.write_bytes(helper.make_model(graph).SerializeToString())


@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.UINT4])
def test_bytes_by_what_they_hold(tmp_path, dtype):
    write_graph(tmp_path / "model.onnx", dtype)
    assert weight_bytes(tmp_path / "model.onnx") == {
        "int8": 24 + 28,
        "int4": 8 + 192 + 32,
        "scales": 12 + 20 + 48 + 4 + 1 + 14 + 8,
        "float16": 12,
        "other": 16,
    }


def test_what_is_no_graph_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"model\.onnx is no ONNX graph"):
        weight_bytes(tmp_path / "model.onnx")
