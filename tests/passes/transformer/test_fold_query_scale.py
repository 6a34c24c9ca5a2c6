"""Attention's scale in the query projection."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.transformer.fold_query_scale import FoldQueryScale
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    tiny_graph,
)

# Heads: 2 of 4; h is the hidden state, k and v come ready.
PLAIN = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,6] h, float[2,4,T] k, float[2,T,4] v) => (float[2,S,4] y)
<float[6,8] w, float[8] b, float c, int64[3] heads> {
  m = MatMul(h, w)
  q = Add(m, b)
  r = Reshape(q, heads)
  s = Mul(r, c)
  t = Transpose<perm=[1,0,2]>(s)
  e = MatMul(t, k)
  p = Softmax<axis=-1>(e)
  y = MatMul(p, v)
}
"""
PLAIN_EXPECTED = PLAIN.replace("  s = Mul(r, c)\n", "").replace("(s)", "(r)")
PLAIN_EXPECTED = PLAIN_EXPECTED.replace("float c, ", "")
ROTARY = PLAIN.replace(
    "float[2,T,4] v)", "float[2,T,4] v, float[S,1,4] cos, float[S,1,4] sin)"
)
ROTARY = ROTARY.replace(
    "  s = Mul(r, c)\n",
    """  left, right = Split<axis=-1, num_outputs=2>(r)
  minus = Neg(right)
  turned = Concat<axis=-1>(minus, left)
  rc = Mul(r, cos)
  rs = Mul(sin, turned)
  rot = Add(rc, rs)
  s = Mul(c, rot)
""",
)


def weights(seed=0, hidden=6, heads=2, size=4, scale=0.35, shape=()):
    generator = np.random.default_rng(seed)
    return {
        "w": generator.standard_normal((hidden, heads * size), dtype=np.float32),
        "b": generator.standard_normal(heads * size, dtype=np.float32),
        "c": np.full(shape, scale, np.float32),
        "heads": np.array([-1, heads, size]),
    }


def without(*names, **settings):
    return {key: value for key, value in weights(**settings).items() if key not in names}


def test_before_and_expected():
    graph = parse_graph(PLAIN, **weights())
    result = check_pass(FoldQueryScale(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(PLAIN_EXPECTED, **without("c")))
    found = constants(graph)
    assert_close(found["w.scaled"], 0.35 * weights()["w"])
    assert_close(found["b.scaled"], 0.35 * weights()["b"])


def test_through_the_rotary_embedding():
    graph = parse_graph(ROTARY, **weights())
    assert check_pass(FoldQueryScale(), graph).rewritten == 1
    expected = ROTARY.replace("  s = Mul(c, rot)\n", "").replace("(s)", "(rot)")
    expected = expected.replace("float c, ", "")
    assert_same_structure(graph, parse_graph(expected, **without("c")))


@pytest.mark.parametrize(
    "change",
    [
        ("  q = Add(m, b)\n", "  q = Identity(m)\n"),
        ("Mul(r, c)\n  t = Transpose<perm=[1,0,2]>(s)",
         "Transpose<perm=[1,0,2]>(r)\n  t = Mul(c, s)"),
        ("Add(m, b)", "Sub(m, b)"),
        ("r = Reshape(q, heads)", "z = Shape(q)\n  zz = Size(z)\n  r = Reshape(q, heads)"),
    ],
    ids=["no-bias", "after-transpose", "sub", "shape-of-it"],
)  # fmt: skip
def test_other_forms(change):
    text = PLAIN.replace(*change)
    if "zz" in text:
        text = text.replace("float[2,S,4] y)", "float[2,S,4] y, int64 zz)")
    if "Identity" in text:
        text = text.replace("float[8] b, ", "")
    graph = parse_graph(text, **(without("b") if "Identity" in text else weights()))
    assert check_pass(FoldQueryScale(), graph).rewritten == 1


def test_a_scale_with_axes_and_a_shared_bias():
    text = PLAIN.replace("float c", "float[1,1] c").replace("{\n", "{\n  u = Neg(b)\n", 1)
    text = text.replace("float[2,S,4] y)", "float[2,S,4] y, float[8] u)")
    graph = parse_graph(text, **weights(shape=(1, 1)))
    assert check_pass(FoldQueryScale(), graph).rewritten == 1
    np.testing.assert_array_equal(constants(graph)["b"], weights()["b"])


def test_two_scales_in_a_row_fold_in_one_run():
    text = PLAIN.replace("s = Mul(r, c)", "s0 = Mul(r, c)\n  s = Mul(d, s0)")
    text = text.replace("float c", "float c, float d")
    graph = parse_graph(text, **weights(), d=np.float32(3))
    result = check_pass(FoldQueryScale(), graph)
    assert (result.matched, result.rewritten) == (2, 2)
    assert_close(constants(graph)["w.scaled.scaled"], 3 * 0.35 * weights()["w"])


def test_a_scale_between_float_casts():
    text = PLAIN.replace("q = Add(m, b)", "f = Add(m, b)\n  l = Cast<to=11>(f)\n  q = CAST")
    graph = parse_graph(text.replace("CAST", "Cast<to=1>(l)"), **weights())
    assert check_pass(FoldQueryScale(), graph).rewritten == 1


@pytest.mark.parametrize("place", ["n = Cast<to=6>(f)", "n = my.Cast<to=1>(f)"])
def test_other_casts_are_refused(place):
    text = PLAIN.replace("q = Add(m, b)", f"f = Add(m, b)\n  {place}\n  q = Cast<to=1>(n)")
    text = text.replace('["" : 20]', '["" : 20, "my" : 1]')
    refuse(parse_graph(text, **weights()), "Cast 'q' stands between the projection")


def test_a_scale_that_adds_an_axis_is_refused():
    text = PLAIN.replace("float c", "float[1,1,1,1] c").replace("2,S,4] y", "1,2,S,4] y")
    text = text.replace("Mul(r, c)\n  t = Transpose<perm=[1,0,2]>(s)",
                        "Transpose<perm=[1,0,2]>(r)\n  t = Mul(c, s)")  # fmt: skip
    graph = parse_graph(text, **weights(shape=(1, 1, 1, 1)))
    refuse(graph, "the scale 'c' adds axes to the query 's'")


def test_a_softmax_of_another_domain_is_no_match():
    text = PLAIN.replace('["" : 20]', '["" : 20, "my" : 1]').replace("Softmax", "my.Softmax")
    assert FoldQueryScale().apply(parse_graph(text, **weights())).matched == 0


def test_a_scale_of_one_is_no_match():
    graph = parse_graph(PLAIN, **weights(scale=1.0))
    assert FoldQueryScale().apply(graph).matched == 0


@pytest.mark.parametrize(
    "change",
    [
        ("p = Softmax<axis=-1>(e)", "p = Relu(e)"),
        ("e = MatMul(t, k)", "f = Neg(t)\n  e = MatMul(f, k)"),
    ],
    ids=["no-attention", "op-between"],
)
def test_no_scale_in_front_of_attention_is_no_match(change):
    graph = parse_graph(PLAIN.replace(*change), **weights())
    assert FoldQueryScale().apply(graph).matched == 0


def extra(text, line, kind):
    text = text.replace("  y = MatMul(p, v)", f"  y = MatMul(p, v)\n  {line}")
    return text.replace("float[2,S,4] y)", f"float[2,S,4] y, {kind})")


BETWEEN = {
    "not-linear": ("q = Relu(n)", "Relu 'q' stands between"),
    "square": ("q = Mul(n, n)", "Mul 'q' takes the query twice"),
    "product": ("x = Neg(n)\n  q = Mul(n, x)", "'n' is also read by"),
    "other-branch": ("q = Add(n, h8)", "depends on 'h8', an input of the graph"),
    "constants": ("x = Mul(b, b)\n  q = Add(n, x)", "Mul 'x' multiplies constants"),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_refusals_for_what_stands_between(case):
    line, reason = BETWEEN[case]
    text = PLAIN.replace("q = Add(m, b)", f"n = Add(m, b)\n  {line}")
    text = text.replace("float[S,6] h", "float[S,6] h, float[S,8] h8")
    refuse(parse_graph(text, **weights()), reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (extra(PLAIN, "u = Neg(w)", "float[6,8] u"), "'w' is shared with Neg"),
        (extra(PLAIN, "u = Neg(m)", "float[S,8] u"), "'m' is also read by Neg"),
        (extra(ROTARY, "u = Neg(left)", "float[S,2,2] u"), "'left' is also read by Neg"),
        (extra(PLAIN, "", "float[S,8] q"), "'q' is also an output"),
        (PLAIN.replace("Mul(r, c)", "Mul(r, d)\n  d = Sqrt(c)"), "'d' is computed by Sqrt"),
    ],
    ids=["shared", "read-elsewhere", "half-read-elsewhere", "output", "computed-scale"],
)
def test_refusals(text, reason):
    refuse(parse_graph(text, **weights()), reason)


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("w", "float[6,8] w", "'w' is an input of the graph"),
        ("b", "float[8] b", "'b', an input of the graph"),
        ("c", "float c", "'c' is an input of the graph"),
    ],
)
def test_refusals_for_graph_inputs(name, kind, reason):
    text = PLAIN.replace(f"{kind}, ", "").replace("(float[S,6] h", f"(float[S,6] h, {kind}")
    refuse(parse_graph(text, **without(name)), reason)


def test_a_quantized_weight_is_refused():
    text = PLAIN.replace("float[6,8] w", "int8[6,8] qw, float qs")
    text = text.replace("m = MatMul(h, w)", "w = DequantizeLinear(qw, qs)\n  m = MatMul(h, w)")
    graph = parse_graph(text, **without("w"), qw=np.ones((6, 8), np.int8), qs=np.float32(1))
    refuse(graph, "fold first, then quantize")


def test_a_residual_over_two_layers_is_refused():
    text = PLAIN.replace("q = Add(m, b)", "n = Add(m, b)\n  z = MatMul(n, u)\n  q = Add(n, z)")
    text = text.replace("float[8] b", "float[8] b, float[8,8] u")
    graph = parse_graph(text, **weights(), u=np.eye(8, dtype=np.float32))
    refuse(graph, "takes the query twice")


def refuse(graph, reason):
    result = FoldQueryScale().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@given(
    hidden=st.integers(1, 6),
    heads=st.integers(1, 4),
    half=st.integers(1, 3),
    length=st.integers(1, 4),
    scale=st.floats(0.01, 4).filter(lambda value: np.float32(value) != 1),
    seed=st.integers(0, 1000),
)
def test_any_size(hidden, heads, half, length, scale, seed):
    size = 2 * half
    text = (
        ROTARY.replace("S,6", f"S,{hidden}").replace("[6,8]", f"[{hidden},{heads * size}]")
        .replace("[8]", f"[{heads * size}]").replace("2,4,T", f"{heads},{size},T")
        .replace("2,T,4", f"{heads},T,{size}").replace("2,S,4", f"{heads},S,{size}")
        .replace("S,1,4", f"S,1,{size}")
    )  # fmt: skip
    graph = parse_graph(text, **weights(seed, hidden, heads, size, scale))
    sizes = {"S": length, "T": 3}
    assert check_pass(FoldQueryScale(), graph, sizes, rtol=2e-5).rewritten == 1


def test_the_captured_encoder():
    assert check_pass(FoldQueryScale(), tiny_graph("vision_encoder")).rewritten == 2


@pytest.mark.parametrize("heads", [4, 2])
def test_the_captured_decoder(heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    sizes = {"S": 3, "T": 4, "I": 5}
    result = check_pass(FoldQueryScale(), graph, sizes, input_ids=320)
    assert (result.matched, result.rewritten) == (2, 2)


def test_nano():
    graph = nano_graph("decoder")
    source, name = constants(graph), "model.layers.2.self_attn.q_proj.weight"
    sizes = {"S": 3, "T": 4, "I": 5}
    assert check_pass(FoldQueryScale(), graph, sizes, input_ids=512).rewritten == 4
    assert is_deferred(graph.tensors()[f"{name}.scaled"])
    assert_close(constants(graph)[f"{name}.scaled"], source[name] / 8)
