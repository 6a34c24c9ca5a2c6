"""RMSNorm's weight in the layers that read it."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.editing import consumers
from mvlm_export.passes.transformer.fold_rmsnorm_weight import FoldRmsNormWeight
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
g (float[S,4] x) => (float[S,6] y, float[S,2] z)
<int64[1] axes = {-1}, float eps = {0.000001}, float[4] g, float[4,6] w, float[4,2] v> {
  s = Mul(x, x)
  m = ReduceMean(s, axes)
  e = Add(m, eps)
  r = Sqrt(e)
  i = Reciprocal(r)
  n = Mul(x, i)
  k = Mul(n, g)
  y = MatMul(k, w)
  z = MatMul(k, v)
}
"""
EXPECTED = BEFORE.replace("  k = Mul(n, g)\n", "").replace("(k,", "(n,")
EXPECTED = EXPECTED.replace("float[4] g, ", "")
SHAPES = {"g": (4,), "w": (4, 6), "v": (4, 2)}


def weights(seed=0, **shapes):
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in {**SHAPES, **shapes}.items()
        if shape is not None
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(FoldRmsNormWeight(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights(g=None)))
    found, given_weights = constants(graph), weights()
    for name in ("w", "v"):
        scaled = given_weights["g"][:, None] * given_weights[name]
        assert_close(found[f"{name}.with_norm"], scaled)


@pytest.mark.parametrize(
    "change",
    [
        ("k = Mul(n, g)", "k = Mul(g, n)"),
        ("n = Mul(x, i)", "n = Mul(i, x)"),
        ("n = Mul(x, i)", "n = Div(x, r)"),
        ("s = Mul(x, x)", "two = Constant<value_float = 2.0>()\n  s = Pow(x, two)"),
    ],
    ids=["weight-first", "reciprocal-first", "div", "pow"],
)
def test_other_spellings(change):
    graph = parse_graph(BEFORE.replace(*change), **weights())
    assert check_pass(FoldRmsNormWeight(), graph).rewritten == 1
    assert not any("g" in [tensor.name for tensor in node.inputs] for node in graph.nodes)


HALF = (
    BEFORE.replace("float[S", "float16[S").replace("float[4,", "float16[4,")
    .replace("s = Mul(x, x)", "f = Cast<to=1>(x)\n  s = Mul(f, f)")
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        (("n = Mul(x, i)\n  k = Mul(n, g)", "n = Mul(f, i)\n  c = Cast<to=10>(n)\n"
          "  k = Mul(c, g)"), np.float16),
        (("n = Mul(x, i)\n  k = Mul(n, g)", "n = Mul(f, i)\n  c = Mul(n, g)\n"
          "  k = Cast<to=10>(c)"), np.float32),
    ],
    ids=["weight-outside", "weight-inside"],
)  # fmt: skip
def test_a_float32_island_in_a_float16_graph(change, scale):
    text = HALF.replace(*change)
    if scale is np.float16:
        text = text.replace("float[4] g", "float16[4] g")
    given_weights = {name: values.astype(np.float16) for name, values in weights().items()}
    given_weights["g"] = given_weights["g"].astype(scale)
    graph = parse_graph(text, **given_weights)
    assert check_pass(FoldRmsNormWeight(), graph, rtol=2e-3).rewritten == 1
    assert constants(graph)["w.with_norm"].dtype == np.float16
    assert [node.op for node in graph.nodes].count("Mul") == 2


def test_what_is_replaced_reads_nothing():
    graph = parse_graph(BEFORE, **weights())
    normed = graph.tensors()["n"]
    FoldRmsNormWeight().run(graph)
    assert [node.op for node in consumers(normed)] == ["MatMul", "MatMul"]


def with_extra(extra, kind):
    text = BEFORE.replace("z = MatMul(k, v)", f"z = MatMul(k, v)\n  u = {extra}")
    return text.replace("float[S,2] z)", f"float[S,2] z, {kind} u)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (with_extra("Relu(k)", "float[S,4]"), "'k' is read by Relu"),
        (with_extra("Cast<to=7>(k)", "int64[S,4]"), "'k' is read by Cast"),
        (with_extra("Neg(v)", "float[4,2]"), "'v' is shared with Neg"),
        (BEFORE.replace("float[S,2] z)", "float[S,2] z, float[S,4] k)"), "an output of the"),
    ],
    ids=["other-reader", "cast", "shared-weight", "output"],
)
def test_refusals(text, reason):
    refuse(parse_graph(text, **weights()), reason)


def test_a_weight_that_is_a_graph_input_is_refused():
    text = BEFORE.replace("float[4] g, ", "").replace(
        "float[S,4] x", "float[S,4] x, float[4] g"
    )
    refuse(parse_graph(text, **weights(g=None)), "'g' is an input of the graph")


def test_a_cast_to_integers_is_refused():
    text = BEFORE.replace("k = Mul(n, g)", "f = Mul(n, g)\n  k = Cast<to=6>(f)")
    text = text.replace("float[S,6]", "int32[S,6]").replace("float[S,2]", "int32[S,2]")
    text = text.replace("float[4,", "int32[4,")
    integers = {name: np.ones(SHAPES[name], np.int32) for name in ("w", "v")}
    refuse(parse_graph(text, g=weights()["g"], **integers), "read by Cast")


def test_one_number_for_all_channels_is_refused():
    text = BEFORE.replace("float[4] g", "float[1] g")
    refuse(parse_graph(text, **weights(g=(1,))), "has shape [1], not one a channel")


def test_a_weight_that_widens_one_channel_is_refused():
    text = BEFORE.replace("float[S,4] x", "float[S,1] x")
    refuse(parse_graph(text, **weights()), "the weight 'g' widens 'n' of ['S', 1]")


def test_a_norm_that_is_cast_to_integers_is_refused():
    text = BEFORE.replace("k = Mul(n, g)", "c = Cast<to=7>(n)\n  l = Mul(c, g)\n  k = CAST")
    text = text.replace("CAST", "Cast<to=1>(l)").replace("float[4] g", "int64[4] g")
    graph = parse_graph(text, **weights(g=None), g=np.arange(4))
    refuse(graph, "Cast 'c' does not give floats")


def test_a_quantized_weight_is_refused():
    text = BEFORE.replace("y = MatMul(k, w)", "d = DequantizeLinear(q, t)\n  y = MatMul(k, d)")
    text = text.replace("float[4,6] w", "int8[4,6] q, float t")
    graph = parse_graph(text, **weights(w=None), q=np.ones((4, 6), np.int8), t=np.float32(1))
    refuse(graph, "fold first, then quantize")


def refuse(graph, reason):
    result = FoldRmsNormWeight().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@pytest.mark.parametrize(
    "change", [("Reciprocal(r)", "Neg(r)"), ("n = Mul(x, i)", "n = Identity(x)")]
)
def test_a_scale_without_a_norm_is_no_match(change):
    graph = parse_graph(BEFORE.replace(*change), **weights())
    assert FoldRmsNormWeight().apply(graph).matched == 0


def test_a_weight_of_two_norms_folds_in_both():
    second = "n2 = Mul(g, n)\n  u = MatMul(n2, p)"
    text = with_extra("X", "float[S,3]").replace("u = X", second)
    text = text.replace("float[4] g", "float[4,3] p, float[4] g")
    graph = parse_graph(text, **weights(p=(4, 3)))
    assert check_pass(FoldRmsNormWeight(), graph).rewritten == 2


@given(
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    length=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_size(width, out, length, seed):
    text = re.sub(r"\b[46]\b", lambda found: str({"4": width, "6": out}[found[0]]), BEFORE)
    shapes = {"g": (width,), "w": (width, out), "v": (width, 2)}
    graph = parse_graph(text, **weights(seed, **shapes))
    assert check_pass(FoldRmsNormWeight(), graph, {"S": length}).rewritten == 1


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}])
def test_the_captured_decoder(changes):
    graph = tiny_graph("decoder", **changes)
    sizes = {"S": 3, "T": 4, "I": 5}
    result = check_pass(FoldRmsNormWeight(), graph, sizes, input_ids=320)
    assert (result.matched, result.rewritten) == (2 * 2 + 1, 2 * 2 + 1)


def test_nano():
    graph = nano_graph("decoder")
    source = constants(graph)
    sizes = {"S": 3, "T": 4, "I": 5}
    assert check_pass(FoldRmsNormWeight(), graph, sizes, input_ids=512).rewritten == 9
    head = graph.tensors()["lm_head.weight.with_norm"]
    assert is_deferred(head)
    scaled = source["model.norm.weight"][:, None] * source["lm_head.weight"]
    assert_close(constants(graph)[head.name], scaled)
    np.testing.assert_array_equal(
        constants(graph)["model.embed_tokens.weight"], source["model.embed_tokens.weight"]
    )
