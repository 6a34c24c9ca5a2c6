"""Float16 with float32 islands."""

import numpy as np
import pytest

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from tests.passes.graphs import (
    assert_same_structure,
    constants,
    parse_graph,
)
from tests.passes.lowering.float16_graphs import (
    BEFORE,
    FP16,
    HEAD,
    casts,
    check,
    dtypes,
    no_scalars,
    weights,
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
