"""LayerNorm's scale and shift in the layers that read it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.transformer.fold_layernorm_affine import FoldLayerNormAffine
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    tiny_graph,
)

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,3,4] x) => (float[B,3,6] y, float[B,3,2] z)
<float[4] gamma, float[4] beta, float[4,6] w, float[6] b, float[4,2] v> {
  n = LayerNormalization(x, gamma, beta)
  m = MatMul(n, w)
  y = Add(m, b)
  z = MatMul(n, v)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,3,4] x) => (float[B,3,6] y, float[B,3,2] z)
<float[4] ones, float[4,6] w, float[6] b, float[4,2] v, float[2] c> {
  n = LayerNormalization(x, ones)
  m = MatMul(n, w)
  y = Add(m, b)
  k = MatMul(n, v)
  z = Add(k, c)
}
"""
SHAPES = {"gamma": (4,), "beta": (4,), "w": (4, 6), "b": (6,), "v": (4, 2)}


def weights(seed=0, **shapes):
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in {**SHAPES, **shapes}.items()
        if shape is not None
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(FoldLayerNormAffine(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    expected = weights(gamma=None, beta=None, ones=(4,), c=(2,))
    assert_same_structure(graph, parse_graph(EXPECTED, **expected))


def test_the_written_values():
    given_weights = weights()
    graph = parse_graph(BEFORE, **given_weights)
    FoldLayerNormAffine().apply(graph)
    gamma, beta, w, b, v = (given_weights[name] for name in ("gamma", "beta", "w", "b", "v"))
    found = constants(graph)
    assert_close(found["w.with_gamma"], gamma[:, None] * w)
    assert_close(found["v.with_gamma"], gamma[:, None] * v)
    assert_close(found["b.with_beta"], b + beta @ w)
    assert_close(found["v.beta"], beta @ v)
    np.testing.assert_array_equal(found["ones_4"], np.ones(4, np.float32))
    assert found.keys() == {"w.with_gamma", "v.with_gamma", "b.with_beta", "v.beta", "ones_4"}


@pytest.mark.parametrize("zero", [True, False], ids=["zeros", "absent"])
def test_without_a_shift_no_bias_is_made(zero):
    given_weights = weights()
    text = BEFORE
    if zero:
        given_weights["beta"][:] = 0
    else:
        text = BEFORE.replace("gamma, beta)", "gamma)").replace("float[4] beta, ", "")
        del given_weights["beta"]
    graph = parse_graph(text, **given_weights)
    assert check_pass(FoldLayerNormAffine(), graph).rewritten == 1
    assert [node.op for node in graph.nodes].count("Add") == 1
    np.testing.assert_array_equal(constants(graph)["b"], given_weights["b"])


def test_a_residual_add_is_no_bias():
    text = BEFORE.replace("y = Add(m, b)", "y = Add(m, m)").replace("float[6] b, ", "")
    graph = parse_graph(text, **weights(b=None))
    assert check_pass(FoldLayerNormAffine(), graph).rewritten == 1
    assert [node.op for node in graph.nodes].count("Add") == 3


def test_an_add_of_another_domain_is_no_bias():
    text = BEFORE.replace('["" : 20]', '["" : 20, "my" : 1]').replace("= Add", "= my.Add")
    graph = parse_graph(text, **weights())
    assert FoldLayerNormAffine().apply(graph).rewritten == 1
    foreign = next(node for node in graph.nodes if node.domain == "my")
    assert foreign.inputs[0].inputs[0].op == "Add"
    assert foreign.inputs[1].name == "b"


def test_a_shared_bias_is_left_to_the_others():
    text = BEFORE.replace("z = MatMul(n, v)", "z = MatMul(n, v)\n  u = Neg(b)").replace(
        "float[B,3,2] z)", "float[B,3,2] z, float[6] u)"
    )
    graph = parse_graph(text, **weights())
    assert check_pass(FoldLayerNormAffine(), graph).rewritten == 1
    np.testing.assert_array_equal(constants(graph)["b"], weights()["b"])


def test_norms_of_one_width_share_their_ones():
    text = BEFORE.replace("z = MatMul(n, v)", "k = LayerNormalization(x, beta, gamma)\n"
                          "  z = MatMul(k, v)")  # fmt: skip
    graph = parse_graph(text, **weights())
    assert check_pass(FoldLayerNormAffine(), graph).rewritten == 2
    scales = [node.inputs[1] for node in graph.nodes if node.op == "LayerNormalization"]
    assert scales[0] is scales[1]


def with_output(line, kind):
    text = BEFORE.replace("z = MatMul(n, v)", f"z = MatMul(n, v)\n  {line}")
    return text.replace("float[B,3,2] z)", f"float[B,3,2] z, {kind})")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (with_output("u = Relu(n)", "float[B,3,4] u"), "'n' is read by Relu"),
        (with_output("u = Neg(w)", "float[4,6] u"), "'w' is shared with Neg"),
        (with_output("u = MatMul(n, w)", "float[B,3,6] u"), "'w' is shared with MatMul"),
        (with_output("", "float[B,3,4] n"), "'n' is an output of the graph"),
        (with_output("u = MatMul(a, n)", "float[B,5,4] u"), "'n' is the right operand of"),
        (with_output("u = MatMul(n, t)", "float[B,3,2] u"), "'t' has 3 axes, not 2"),
    ],
    ids=["other-reader", "shared", "one-for-two", "output", "right-operand", "batched"],
)
def test_refusals_for_a_reader(text, reason):
    text = text.replace("<float[4] gamma", "<float[5,3] a, float[1,4,2] t, float[4] gamma")
    more = {name: shape for name, shape in (("a", (5, 3)), ("t", (1, 4, 2))) if
            f"({name}, " in text or f", {name})" in text}  # fmt: skip
    refuse(parse_graph(text, **weights(**more)), reason)


@pytest.mark.parametrize(
    ("change", "dropped", "reason"),
    [
        (("float[4] gamma, float[4] beta", "float[4] beta"), "gamma", "'gamma' is an input"),
        (("float[4,6] w, float[6] b", "float[6] b"), "w", "'w' is an input"),
    ],
    ids=["scale", "weight"],
)
def test_refusals_for_graph_inputs(change, dropped, reason):
    kind = "float[4] gamma" if dropped == "gamma" else "float[4,6] w"
    text = BEFORE.replace(*change).replace("(float[B,3,4] x)", f"(float[B,3,4] x, {kind})")
    refuse(parse_graph(text, **weights(**{dropped: None})), reason)


def test_a_quantized_weight_is_refused():
    text = BEFORE.replace("m = MatMul(n, w)", "d = DequantizeLinear(q, s)\n  m = MatMul(n, d)")
    text = text.replace("float[4,6] w", "int8[4,6] q, float s")
    graph = parse_graph(text, **weights(w=None), q=np.ones((4, 6), np.int8), s=np.float32(1))
    refuse(graph, "fold first, then quantize")


def test_one_scale_for_all_channels_is_refused():
    text = BEFORE.replace("float[4] gamma", "float[1] gamma")
    refuse(parse_graph(text, **weights(gamma=(1,))), "has shape [1], not one a channel")


def refuse(graph, reason):
    result = FoldLayerNormAffine().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@given(
    width=st.integers(2, 9),  # of one number ONNX Runtime 1.23 takes no norm
    out=st.integers(1, 9),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(width, out, batch, seed):
    text = re.sub(r"\b[46]\b", lambda found: str({"4": width, "6": out}[found[0]]), BEFORE)
    shapes = {"gamma": (width,), "beta": (width,), "w": (width, out), "b": (out,)}
    graph = parse_graph(text, **weights(seed, **shapes, v=(width, 2)))
    assert check_pass(FoldLayerNormAffine(), graph, {"B": batch}, rtol=3e-5).rewritten == 1


def test_the_captured_encoder():
    # Of its three layers the last is not captured: features are taken before it.
    result = check_pass(FoldLayerNormAffine(), tiny_graph("vision_encoder"))
    assert (result.matched, result.rewritten) == (2 * 2 + 1, 2 * 2)
    assert "is read by LayerNormalization" in result.refusals[0].reason


def test_nano():
    graph = nano_graph("vision_encoder")
    source, stem = constants(graph), "encoder.layers.1"
    result = check_pass(FoldLayerNormAffine(), graph)
    assert (result.matched, result.rewritten) == (9, 8)
    weight = graph.tensors()[f"{stem}.mlp.fc1.weight.with_gamma"]
    assert is_deferred(weight)
    norm, layer = f"{stem}.layer_norm2", f"{stem}.mlp.fc1"
    found = constants(graph)
    scaled = source[f"{norm}.weight"][:, None] * source[f"{layer}.weight"]
    assert_close(found[weight.name], scaled)
    moved = source[f"{norm}.bias"] @ source[f"{layer}.weight"]
    assert_close(found[f"{layer}.bias.with_beta"], source[f"{layer}.bias"] + moved)
