"""Float16 with float32 islands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.exporter.tolerances import TOLERANCES
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from mvlm_export.passes.lowering.float16_weights import float16_problem
from tests.passes.graphs import (
    assert_same_structure,
    constants,
    parse_graph,
    random_feeds,
    run_graph,
)

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
FP16 = TOLERANCES["float16"].relative
BEFORE = (
    HEAD
    + """
g (float[S,4] x, bool[S,S] seen) => (float[S,4] y, float[S,6] logits)
  <float[4] n, float[4,4] k, float[4,6] h, float eps, float nil = {0}, float far = {-1e30},
   int64[1] last = {-1}> {
  square = Mul(x, x)
  mean = ReduceMean(square, last)
  safe = Add(mean, eps)
  root = Sqrt(safe)
  inverse = Reciprocal(root)
  normal = Mul(x, inverse)
  scaled = Mul(normal, n)
  keys = MatMul(scaled, k)
  turned = Transpose<perm=[1,0]>(keys)
  scores = MatMul(scaled, turned)
  mask = Where(seen, nil, far)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  mixed = MatMul(weights, keys)
  y = Add(x, mixed)
  logits = MatMul(y, h)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float16[S,4] x, bool[S,S] seen) => (float16[S,4] y, float[S,6] logits)
  <float16[4] n, float16[4,4] k, float16[4,6] h, float eps, float nil, float far,
   int64[1] last = {-1}> {
  wide = Cast<to=1>(x)
  square = Mul(wide, wide)
  mean = ReduceMean(square, last)
  safe = Add(mean, eps)
  root = Sqrt(safe)
  inverse = Reciprocal(root)
  normal = Mul(wide, inverse)
  narrow = Cast<to=10>(normal)
  scaled = Mul(narrow, n)
  keys = MatMul(scaled, k)
  turned = Transpose<perm=[1,0]>(keys)
  scores = MatMul(scaled, turned)
  mask = Where(seen, nil, far)
  scores32 = Cast<to=1>(scores)
  masked = Add(scores32, mask)
  weights = Softmax(masked)
  weights16 = Cast<to=10>(weights)
  mixed = MatMul(weights16, keys)
  y = Add(x, mixed)
  z = MatMul(y, h)
  logits = Cast<to=1>(z)
}
"""
)


def weights(dtype=np.float32, **changes):
    generator = np.random.default_rng(0)
    made = {
        "n": generator.standard_normal(4).astype(dtype),
        "k": generator.standard_normal((4, 4)).astype(dtype),
        "h": generator.standard_normal((4, 6)).astype(dtype),
        "eps": np.array(1e-6, np.float32),
    }
    return {**made, **changes}


def no_scalars():
    return {"nil": np.array(0, np.float32), "far": np.array(-1e30, np.float32)}


def relative(found, expected):
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(graph, sizes=None, bound=FP16, **ranges):
    """Convert, and hold the result to the table's float16 bound; outputs by name."""
    rewrite = ConvertToFloat16(keep_io=["logits"])
    before = graph.copy()
    result = rewrite.apply(graph)
    feeds = random_feeds(graph, sizes, **ranges)
    expected = run_graph(before, rewrite.feeds_before(feeds))
    found = run_graph(graph, feeds)
    for name, values in rewrite.outputs_after(expected, feeds).items():
        assert found[name].dtype == values.dtype
        assert relative(found[name], expected[name]) < bound
    assert rewrite.apply(graph.copy()).matched == len(result.refusals)
    return result


def dtypes(graph, op):
    return {str(np.dtype(node.outputs[0].dtype)) for node in graph.nodes if node.op == op}


def casts(graph):
    return [node for node in graph.nodes if node.op == "Cast"]


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check(graph)
    assert (result.matched, result.rewritten) == (7, 7)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights(np.float16), **no_scalars()))


def test_weights_are_the_rounded_ones():
    graph = parse_graph(BEFORE, **weights())
    ConvertToFloat16().apply(graph)
    for name in ("n", "k", "h"):
        found = constants(graph)[f"{name}.float16"]
        np.testing.assert_array_equal(found, weights()[name].astype(np.float16))
    assert constants(graph)["eps"].dtype == np.float32


def test_without_names_to_keep_every_output_is_float16():
    graph = parse_graph(BEFORE, **weights())
    ConvertToFloat16().apply(graph)
    assert [np.dtype(t.dtype) for t in graph.outputs] == [np.float16, np.float16]
    assert len(casts(graph)) == 4


def test_an_input_that_is_kept_is_cast_once():
    graph = parse_graph(BEFORE, **weights())
    rewrite = ConvertToFloat16(keep_io=["x", "logits", "no such name"])
    rewrite.apply(graph)
    assert np.dtype(graph.inputs[0].dtype) == np.float32
    assert len([node for node in casts(graph) if node.inputs[0].name == "x"]) == 1


def test_a_float16_graph_has_nothing_to_convert():
    graph = parse_graph(EXPECTED, **weights(np.float16), **no_scalars())
    assert ConvertToFloat16(keep_io=["logits"]).apply(graph).matched == 0


def test_a_graph_of_islands_alone_gets_float16_ends():
    graph = parse_graph(HEAD + "g (float[S,4] x) => (float[S,4] y) { y = Softmax(x) }")
    assert check(graph).rewritten == 2
    assert [node.op for node in graph.nodes] == ["Cast", "Softmax", "Cast"]


def test_progress_names_each_weight():
    seen = []
    graph = parse_graph(BEFORE, **weights())
    ConvertToFloat16(progress=lambda *step: seen.append(step)).apply(graph)
    assert seen == [(1, 3, "n"), (2, 3, "k"), (3, 3, "h")]


# Weights that float16 does not hold


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1e6, "the weight 'k' holds 1e+06, beyond float16's 65504"),
        (65505.0, "the weight 'k' holds 65505, beyond"),
        (-7e4, "the weight 'k' holds 70000, beyond"),
    ],
)
def test_an_overflowing_weight_is_named_and_kept(value, reason):
    k = weights()["k"].copy()
    k[1, 2] = value
    graph = parse_graph(BEFORE, **weights(k=k))
    rewrite = ConvertToFloat16(keep_io=["logits"])
    result = rewrite.apply(graph)
    assert (result.matched, result.rewritten) == (7, 6)
    assert "MatMul" in result.refusals[0].node
    assert reason in result.refusals[0].reason
    np.testing.assert_array_equal(constants(graph)["k"], k)
    keys = next(node for node in graph.nodes if node.outputs[0].name == "keys")
    assert [np.dtype(t.dtype) for t in (*keys.inputs, *keys.outputs)] == [np.float32] * 3


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (1e-9, "would be all zeros in float16 (largest: "),
        (1e-7, "its cosine with what it was"),
    ],
)
def test_an_underflowing_weight_is_named_and_kept(scale, reason):
    graph = parse_graph(BEFORE, **weights(k=weights()["k"] * np.float32(scale)))
    result = check(graph)
    assert (result.matched, result.rewritten) == (7, 6)
    assert "the weight 'k'" in result.refusals[0].reason
    assert reason in result.refusals[0].reason


def test_the_largest_numbers_and_zeros_are_converted():
    k = np.zeros((4, 4), np.float32)
    assert check(parse_graph(BEFORE, **weights(k=k))).rewritten == 7
    k[0, 0] = 65504
    assert float16_problem("k", k, exact=False) is None


def test_nan_in_a_weight_is_an_error():
    k = weights()["k"].copy()
    k[0, 0] = np.nan
    with pytest.raises(PassError, match="the weight 'k' holds values that are no numbers"):
        ConvertToFloat16().apply(parse_graph(BEFORE, **weights(k=k)))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_mask_of_infinities_keeps_its_node(value):
    text = "g (float[4,4] x) => (float[4,4] y) { a = Relu(x)\n b = Min(a, m)\n y = Neg(b) }"
    text = text.replace("Min", "Max") if value < 0 else text
    mask = np.where(np.tri(4) > 0, np.float32(0.5), np.float32(value))
    graph = parse_graph(HEAD + text, m=mask)
    before, result = graph.copy(), ConvertToFloat16().apply(graph)
    feeds = {"x": np.arange(16, dtype=np.float16).reshape(4, 4)}
    found = run_graph(graph, feeds)["y"]
    expected = run_graph(before, {"x": feeds["x"].astype(np.float32)})["y"]
    np.testing.assert_array_equal(found, expected.astype(np.float16))
    assert (result.matched, result.rewritten) == (3, 2)
    assert "the weight 'm' holds inf, beyond float16's" in result.refusals[0].reason


@pytest.mark.parametrize("op", ["Div", "Mod<fmod=1>"])
def test_divisors_are_held_exactly(op):
    text = f"g (float[4] x) => (float[4] y) {{ a = Relu(x)\n b = {op}(a, d)\n y = Neg(b) }}"
    divisors = np.array([1, 2, 1e-8, 1], np.float32)
    graph = parse_graph(HEAD + text, d=divisors)
    result = ConvertToFloat16().apply(graph)
    assert (result.matched, result.rewritten) == (3, 2)
    assert "the constant 'd' holds 1e-08, which float16 does not" in result.refusals[0].reason
    np.testing.assert_array_equal(constants(graph)["d"], divisors)


@pytest.mark.parametrize("value", [1e-6, -1e30, 1e5, -np.inf])
def test_scalars_that_float16_does_not_hold_keep_their_node(value):
    text = (
        "g (float[S] x) => (float[S] y) <float c> { a = Relu(x)\n b = Add(a, c)\n y = Neg(b) }"
    )
    graph = parse_graph(HEAD + text, c=np.array(value, np.float32))
    result = ConvertToFloat16().apply(graph)
    assert (result.matched, result.rewritten) == (3, 2)
    assert "the constant 'c' holds" in result.refusals[0].reason
    assert dtypes(graph, "Add") == {"float32"}


def test_a_shared_weight_stays_for_those_that_need_float32():
    text = """g (float[S,4] x) => (float[S,4] y) <float[4] w> {
      a = Mul(x, w)
      e = Exp(x)
      b = Mul(e, w)
      y = Add(a, b) }"""
    graph = parse_graph(HEAD + text, w=weights()["n"])
    check(graph)
    assert {"w", "w.float16"} <= set(constants(graph))


@given(
    st.lists(st.floats(-60000, 60000, width=32), min_size=2, max_size=40),
    st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]),
)
def test_what_is_said_of_weights_is_true(numbers, scale):
    values = np.array(numbers, np.float32) * np.float32(scale)
    narrow = values.astype(np.float16).astype(np.float64)
    problem = float16_problem("w", values, exact=False)
    if problem is None:
        assert np.isfinite(narrow).all()
        norms = np.linalg.norm(values.astype(np.float64)) * np.linalg.norm(narrow)
        assert not values.any() or narrow @ values >= 0.9998 * norms
    else:
        assert relative(narrow, values) > 0.01


def test_quantizer_scales_are_held_exactly():
    values = np.array([0.5, 3e-7], np.float32)
    assert float16_problem("s", values, exact=False) is None
    assert "'s' holds 3e-07" in float16_problem("s", values, exact=True)


# Islands


@pytest.mark.parametrize(
    ("nodes", "narrow", "wide"),
    [
        ("a = Relu(x)\n y = LayerNormalization(a, w, w)", {"LayerNormalization"}, set()),
        ("a = Gelu(x)\n b = Sigmoid(a)\n y = HardSwish(b)", {"Gelu", "Sigmoid"}, set()),
        ("a = Mul(x, w)\n b = Exp(a)\n y = Neg(b)", set(), {"Exp", "Mul"}),
        ("m = ReduceMean(x, i)\n d = Sub(x, m)\n y = MatMul(d, k)", {"MatMul"}, {"Sub"}),
        ("a = Sin(x)\n y = Mul(a, w)", {"Mul"}, {"Sin"}),
        (
            "a = Mul(x, w)\n t = Transpose(a)\n s = Softmax(t)\n u = Transpose(s)\n"
            "v = Softmax(u)\n y = MatMul(v, k)",
            {"MatMul"},
            {"Mul", "Transpose", "Softmax"},
        ),
    ],
    ids=["layer-norm", "activations", "exp", "mean", "sin", "between"],
)
def test_what_computes_in_which_dtype(nodes, narrow, wide):
    text = (
        f"g (float[S,4] x) => (float[N,4] y) <float[4] w, int64[1] i = {{-1}}> {{ {nodes} }}"
    )
    used = {"k": weights()["k"], "w": weights()["n"]}
    used = {name: values for name, values in used.items() if f" {name})" in nodes}
    graph = parse_graph(HEAD + text, **used)
    check(graph, {"S": 4})
    for op in narrow:
        assert dtypes(graph, op) == {"float16"}
    for op in wide:
        assert dtypes(graph, op) == {"float32"}


def test_a_mask_that_is_reshaped_keeps_its_range():
    text = BEFORE.replace(
        "masked = Add(scores, mask)",
        "o = Constant<value=int64[1] {0}>()\n m = Unsqueeze(mask, o)\n"
        "b = Unsqueeze(scores, o)\n c = Add(b, m)\n masked = Squeeze(c, o)",
    )
    graph = parse_graph(text, **weights())
    check(graph)
    assert dtypes(graph, "Unsqueeze") == {"float32"}


def test_positions_stay_float32_until_their_sine():
    text = """g (int32[S] p) => (float[S,4] y) <float[1,4] w> {
      f = Cast<to=1>(p)
      i = Constant<value=int64[1] {1}>()
      u = Unsqueeze(f, i)
      a = Mul(u, w)
      y = Cos(a) }"""
    graph = parse_graph(HEAD + text, w=weights()["n"].reshape(1, 4))
    ConvertToFloat16().apply(graph)
    assert dtypes(graph, "Mul") == dtypes(graph, "Cos") == {"float32"}


@pytest.mark.parametrize(
    ("angle", "table"),
    [
        ("MatMul(u, t)", np.array([[1, 0.1, 0.01, 0.001]])),
        ('Einsum<equation="ij,jk->ik">(u, t)', np.array([[1, 0.1, 0.01, 0.001]])),
        ("Gather(t, p)", np.arange(5000)[:, None] * [[1, 0.1, 0.01, 0.001]]),
    ],
    ids=["product", "einsum", "table"],
)
def test_angles_stay_float32_until_their_cosine(angle, table):
    text = f"""g (int64[S] p) => (float[S,4] y) {{
      f = Cast<to=1>(p)
      i = Constant<value=int64[1] {{1}}>()
      u = Unsqueeze(f, i)
      a = {angle}
      y = Cos(a) }}"""
    graph = parse_graph(HEAD + text, t=table.astype(np.float32))
    before, feeds = graph.copy(), {"p": np.array([5, 2047, 4001])}
    ConvertToFloat16().apply(graph)
    found, expected = (run_graph(g, feeds)["y"] for g in (graph, before))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    "nodes",
    [
        "d = Div(f, k)\n r = Floor(d)",
        "d = Div(f, k)\n r = Ceil(d)",
        "d = Div(f, k)\n r = Round(d)",
        "r = Mod<fmod=1>(f, k)",
        "s = Relu(f)\n r = Mul(s, k)",
    ],
    ids=["floor", "ceil", "round", "mod", "relu"],
)
def test_index_arithmetic_stays_float32(nodes):
    text = f"""g (int64[4] x, float[4] z) => (int64[4] i, float[4] y) <float k = {{3}}> {{
      f = Cast<to=1>(x)
      {nodes}
      i = Cast<to=7>(r)
      y = Mul(z, k) }}"""
    graph = parse_graph(HEAD + text)
    before, x = graph.copy(), np.array([5001, 7001, 12344, 65535])
    assert ConvertToFloat16().apply(graph).rewritten == 1
    z = np.ones(4, np.float32)
    found = run_graph(graph, {"x": x, "z": z.astype(np.float16)})
    np.testing.assert_array_equal(found["i"], run_graph(before, {"x": x, "z": z})["i"])
    assert dtypes(graph, "Mul") >= {"float16"}


def test_pixels_of_bytes_to_bytes_are_no_index_arithmetic():
    text = """g (uint8[B] x) => (uint8[B] y) <float k = {2}> {
      a = Cast<to=1>(x)
      b = Div(a, k)
      c = Relu(b)
      y = Cast<to=2>(c) }"""
    graph = parse_graph(HEAD + text)
    ConvertToFloat16().apply(graph)
    assert dtypes(graph, "Relu") == {"float16"}


def test_a_cast_like_another_tensor_stays_float32():
    text = """g (int64[4] x, float[4] z) => (float[4] y) {
      r = Relu(z)
      f = CastLike(x, r)
      e = Exp(r)
      u = Add(f, e)
      y = Neg(u) }"""
    graph = parse_graph(HEAD + text)
    check(graph)
    assert dtypes(graph, "CastLike") == {"float32"}


# Constants that are no initializers of inner nodes


def test_constant_nodes_become_float16_weights():
    text = """g (float[S,2] x) => (float[S,2] y) {
      c = Constant<value=float[2] {1.5, 3}>()
      y = Add(x, c) }"""
    graph = parse_graph(HEAD + text)
    assert check(graph).rewritten == 1
    assert [node.op for node in graph.nodes] == ["Add"]
    np.testing.assert_array_equal(
        constants(graph)["c.float16"], np.array([1.5, 3], np.float16)
    )


def test_constant_nodes_of_another_form_are_an_error():
    text = "g (float[2] x) => (float[2] y) { c = Constant<value_floats=[1.0, 2.0]>()\n"
    graph = parse_graph(HEAD + text + "y = Add(x, c) }")
    with pytest.raises(PassError, match="Constant 'c' holds its numbers as value_floats"):
        ConvertToFloat16().apply(graph)


@pytest.mark.parametrize("keep", [[], ["w"]], ids=["converted", "kept"])
def test_a_weight_that_is_an_output_of_the_graph(keep):
    text = "g (float[S,2] x) => (float[S,2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"
    graph = parse_graph(HEAD + text)
    graph.outputs.append(graph.tensors()["w"])
    rewrite, before = ConvertToFloat16(keep_io=keep), graph.copy()
    rewrite.apply(graph)
    feeds = random_feeds(graph)
    expected = rewrite.outputs_after(run_graph(before, rewrite.feeds_before(feeds)), feeds)
    found = run_graph(graph, feeds)
    assert list(found) == ["y", "w"]
    assert found["w"].dtype == expected["w"].dtype == (np.float32 if keep else np.float16)
    np.testing.assert_array_equal(found["w"], expected["w"])


# Casts that were there


def test_casts_that_were_there_are_not_doubled():
    text = """g (float[S] x) => (float[S] y) {
      a = Cast<to=10>(x)
      b = Neg(a)
      c = Cast<to=1>(b)
      y = Abs(c) }"""
    graph = parse_graph(HEAD + text)
    check(graph)
    assert [node.op for node in graph.nodes] == ["Neg", "Abs"]


def test_pixels_of_bytes_are_cast_straight_to_float16():
    text = "g (uint8[B] x) => (float[B] y) { a = Cast<to=1>(x)\n y = Relu(a) }"
    graph = parse_graph(HEAD + text)
    check(graph)
    assert [node.op for node in graph.nodes] == ["Cast", "Relu"]
    assert dtypes(graph, "Cast") == {"float16"}


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = my.Swirl(x)", "no operator of ONNX"),
        ("a, m, y = LayerNormalization(x, w)", "has no float16 form in opset 20"),
    ],
)
def test_operators_without_a_float16_form_are_refused(nodes, reason):
    head = HEAD.replace('"" : 20', '"" : 20, "my" : 1')
    text = f"g (float[S,4] x) => (float[S,C] y) <float[4] w = {{1,1,1,1}}> {{ {nodes} }}"
    graph = parse_graph(head + text)
    for tensor in graph.nodes[0].outputs:
        tensor.dtype = np.dtype(np.float32)
    result = ConvertToFloat16(keep_io=["x", "y"]).run(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@pytest.mark.parametrize(("scale", "narrow"), [(0.01, True), (1e-7, False)])
def test_quantized_weights_get_scales_of_float16(scale, narrow):
    text = """g (float[S,4] x) => (float[S,4] y) <int8[4,4] q, float[4] s> {
      w = DequantizeLinear<axis=1>(q, s)
      y = MatMul(x, w) }"""
    codes = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
    graph = parse_graph(HEAD + text, q=codes, s=np.full(4, scale, np.float32))
    result = check(graph, bound=FP16 if narrow else np.inf)
    assert len(result.refusals) == (not narrow)
    assert dtypes(graph, "DequantizeLinear") == {"float16" if narrow else "float32"}
    assert dtypes(graph, "MatMul") == {"float16"}
    np.testing.assert_array_equal(constants(graph)["q"], codes)


def test_control_flow_is_an_error():
    text = """g (float[B] x, bool c) => (float[B] y) { y = If (c) <
        then_branch = t () => (float[B] r) { r = Abs(x) },
        else_branch = e () => (float[B] s) { s = Neg(x) }> }"""
    with pytest.raises(PassError, match="holds a graph of its own"):
        ConvertToFloat16().apply(parse_graph(HEAD + text))


@pytest.mark.parametrize(
    ("nodes", "problem"),
    [
        ("a = Cast<to=1>(x)\n b = Cast<to=10>(a)\n y = Neg(b)", "undoes Cast"),
        (
            "a = Cast<to=1>(x)\n b = Cast<to=1>(x)\n c = Exp(a)\n d = Exp(b)\n"
            "e = Add(c, d)\n y = Cast<to=10>(e)",
            "does the same as Cast",
        ),
        ("a = Cast<to=1>(x)\n y = Neg(x)", "has no reader"),
    ],
)
def test_ensures_finds_idle_casts(nodes, problem):
    graph = parse_graph(f"{HEAD} g (float16[S] x) => (float16[S] y) {{ {nodes} }}")
    with pytest.raises(PassError, match=problem):
        ConvertToFloat16().ensures(graph)
