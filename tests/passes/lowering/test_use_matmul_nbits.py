"""Products with 4-bit weights in ONNX Runtime's own operator."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.engines.targets import get_target
from mvlm_export.passes.deferred import DeferredValues, is_deferred
from mvlm_export.passes.graph_io import bind_weight, to_model
from mvlm_export.passes.lowering.use_matmul_nbits import UseMatMulNBits
from mvlm_export.passes.pipeline import ModelFacts, PipelineOptions, build_pipeline
from tests.passes.graphs import assert_same_structure, check_pass, constants, parse_graph

BEFORE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[M,64] x, int4[64,24] q) => (float[M,24] y) <float[4,24] s> {
  w = DequantizeLinear<axis=0, block_size=16>(q, s)
  y = MatMul(x, w)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
g (float[M,64] x) => (float[M,24] y) <uint8[24,4,8] b, float[24,4] s> {
  y = com.microsoft.MatMulNBits<K=64, N=24, bits=4, block_size=16, accuracy_level=0>(x, b, s)
}
"""


def weights(rows=64, columns=24, block=16, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    quantized = generator.integers(-8, 8, (rows, columns)).astype(ml_dtypes.int4)
    scales = generator.uniform(0.1, 1, (rows // block, columns)).astype(dtype)
    return quantized, scales


def graph_of(*changes, quantized=None, scales=None, text=BEFORE, **others):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    if quantized is None:
        quantized, scales = weights()
    graph = parse_graph(text, s=scales, **others)
    values = DeferredValues(quantized.shape, quantized.dtype, lambda: quantized)
    bind_weight(graph, "q", values)
    return graph


def test_before_and_expected():
    graph = graph_of()
    result = check_pass(UseMatMulNBits(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    packed = {"b": np.zeros((24, 4, 8), np.uint8), "s": np.zeros((24, 4), np.float32)}
    assert_same_structure(graph, parse_graph(EXPECTED, **packed))
    onnx.checker.check_model(to_model(graph), full_check=True)


def test_two_values_a_byte_the_earlier_one_low():
    quantized, scales = weights()
    graph = graph_of()
    UseMatMulNBits().apply(graph)
    assert is_deferred(graph.tensors()["q.packed"])
    written = constants(graph)
    np.testing.assert_array_equal(written["s.by_column"], scales.T)
    packed = written["q.packed"].reshape(24, 32)
    unpacked = np.stack([packed & 15, packed >> 4], -1).reshape(24, 64).astype(np.int8) - 8
    np.testing.assert_array_equal(unpacked.T, quantized.astype(np.int8))


READ_TWICE = ("y = MatMul(x, w)", "y = MatMul(x, w)\n  z = Relu(w)")
SHARED = (
    "y = MatMul(x, w)",
    "y = MatMul(x, w)\n  z = DequantizeLinear<axis=0, block_size=16>(q, s)",
)
TWO_OUTPUTS = ("(float[M,24] y)", "(float[M,24] y, float[64,24] z)")


def block(size):
    return [("block_size=16", f"block_size={size}"), ("[4,24]", f"[{-(-64 // size)},24]")]


@pytest.mark.parametrize(
    ("changes", "scales", "reason"),
    [
        ([READ_TWICE, TWO_OUTPUTS], (4, 24), "'w' inside it is also read by Relu"),
        ([SHARED, TWO_OUTPUTS], (4, 24), "the weight 'q' is shared with DequantizeLinear"),
        ([("axis=0", "axis=1"), ("[4,24]", "[64,2]")], (64, 2), "do not lie along its rows"),
        (block(8), (8, 24), "'q' has blocks of 8, not one of 16, 32, 64, 128, 256"),
        (block(48), (2, 24), "'q' has blocks of 48, not one of 16,"),
        (block(128), (1, 24), "the 64 rows of 'q' are no blocks of 128"),
        ([("(q, s)", "(q, t)"), ("  w =", "  t = Abs(s)\n  w =")], (4, 24), "by Abs"),
    ],
    ids=["read", "shared", "axis", "small", "odd", "ragged", "computed"],
)
def test_refusals(changes, scales, reason):
    graph = graph_of(*changes, quantized=weights()[0], scales=np.ones(scales, np.float32))
    assert reason in only_refusal(graph)


def only_refusal(graph):
    result = UseMatMulNBits().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    return result.refusals[0].reason


def test_a_weight_of_8_bits():
    quantized, scales = weights()
    text = BEFORE.replace("int4", "int8")
    graph = graph_of(text=text, quantized=quantized.astype(np.int8), scales=scales)
    assert "the weight 'q' is int8, not int4" in only_refusal(graph)


def test_a_weight_that_the_caller_gives():
    graph = parse_graph(BEFORE, s=weights()[1])
    assert "the weight 'q' is an input of the graph" in only_refusal(graph)


@pytest.mark.parametrize(("value", "rewritten"), [(0, 1), (3, 0)])
def test_zero_points(value, rewritten):
    changes = [("int4[64,24] q)", "int4[64,24] q, int4[4,24] o)"), ("(q, s)", "(q, s, o)")]
    graph = graph_of(*changes)
    zero = np.full((4, 24), value, ml_dtypes.int4)
    bind_weight(graph, "o", DeferredValues(zero.shape, zero.dtype, lambda: zero))
    if rewritten:
        assert check_pass(UseMatMulNBits(), graph).rewritten == 1
    else:
        assert only_refusal(graph) == "the zero point 'o' is not 0"


def test_another_operator_between_is_no_match():
    graph = graph_of(("y = MatMul(x, w)", "r = Relu(w)\n  y = MatMul(x, r)"))
    assert UseMatMulNBits().apply(graph).matched == 0


@settings(deadline=None, max_examples=25)
@given(
    blocks=st.integers(1, 5),
    size=st.sampled_from([16, 32, 64]),
    columns=st.integers(1, 40),
    tokens=st.integers(1, 5),
    level=st.sampled_from([0, 1]),
    seed=st.integers(0, 100),
)
def test_any_size(blocks, size, columns, tokens, level, seed):
    rows = blocks * size
    changes = [("64", str(rows)), ("24", str(columns)), ("[4,", f"[{blocks},")]
    changes.append(("block_size=16", f"block_size={size}"))
    quantized, scales = weights(rows, columns, size, seed)
    graph = graph_of(*changes, quantized=quantized, scales=scales)
    assert check_pass(UseMatMulNBits(level), graph, {"M": tokens}).rewritten == 1


def test_half_precision():
    quantized, scales = weights(dtype=np.float16)
    graph = graph_of(("float[", "float16["), quantized=quantized, scales=scales)
    assert check_pass(UseMatMulNBits(), graph, rtol=2e-3).rewritten == 1


def test_activations_of_8_bits_are_near():
    graph = graph_of()
    assert check_pass(UseMatMulNBits(4), graph, rtol=0.03).rewritten == 1
    (node,) = graph.nodes
    assert node.attrs["accuracy_level"] == 4


FACTS = ModelFacts(
    vision_layers=2,
    keeps_class_token=False,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    pools=True,
    has_peg=True,
    ldp_blocks=0,
    decoder_layers=2,
    head_dim=16,
    positions=256,
)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_pipelines_round_activations_to_8_bits(name, target):
    steps = build_pipeline(name, FACTS, get_target(target), PipelineOptions("float32"))
    (rewrite,) = [step.rewrite for step in steps if isinstance(step.rewrite, UseMatMulNBits)]
    graph = graph_of()
    assert rewrite.apply(graph).rewritten == 1
    assert graph.nodes[0].attrs["accuracy_level"] == 4


def test_an_accuracy_level_that_is_none():
    with pytest.raises(PassError, match="no accuracy_level 5; give one of 0 "):
        UseMatMulNBits(5)


@pytest.mark.parametrize("size", [256, 512])
def test_blocks_larger_than_the_kernel_takes(size):
    quantized, scales = weights(512, block=size)
    sizes = ("64", "512"), ("[4,24]", f"[{512 // size},24]"), ("=16", f"={size}")
    graph = graph_of(*sizes, quantized=quantized, scales=scales)
    result = check_pass(UseMatMulNBits(), graph)
    assert (result.matched, result.rewritten) == (1, int(size == 256))
