"""Which operators keep computing in float32."""

import numpy as np
import pytest

from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from tests.passes.graphs import (
    parse_graph,
    run_graph,
)
from tests.passes.lowering.float16_graphs import (
    BEFORE,
    HEAD,
    check,
    dtypes,
    weights,
)


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
