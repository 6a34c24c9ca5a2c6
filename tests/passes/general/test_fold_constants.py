"""What is known beforehand becomes a constant."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import DeferredValues
from mvlm_export.passes.general.fold_constants import FoldConstants
from mvlm_export.passes.graph_io import import_graph
from mvlm_export.passes.type_inference import infer_types
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
)

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
BEFORE = (
    HEAD
    + """
g (float[B,6] x) => (float[B,2,3] y)
  <int64[2] a = {1, 2}, int64[1] b = {-1}, int64 one = {1}> {
  doubled = Mul(a, a)
  part = Slice(doubled, one_1, two_1)
  less = Sub(part, one)
  s = Concat<axis=0>(b, two_1, less)
  y = Reshape(x, s)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float[B,6] x) => (float[B,2,3] y) <int64[3] s = {-1, 2, 3}> {
  y = Reshape(x, s)
}
"""
)
ONE_TWO = {"one_1": np.array([1]), "two_1": np.array([2])}


def test_before_and_expected():
    graph = parse_graph(BEFORE, **ONE_TWO)
    result = check_pass(FoldConstants(), graph)
    assert (result.matched, result.rewritten) == (4, 4)
    assert_same_structure(graph, parse_graph(EXPECTED))
    np.testing.assert_array_equal(constants(graph)["s"], [-1, 2, 3])


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        ("y = Shape<start=1, end=3>(x)", [4, 5]),
        ("y = Shape<start=-1>(x)", [5]),
        (
            "s = Shape(x)\n i = Constant<value=int64[2] {2,-2}>()\n y = Gather<axis=0>(s, i)",
            [5, 4],
        ),
        ("s = Shape<start=1>(x)\n i = Constant<value=int64[1] {0}>()\n y = Gather(s, i)", [4]),
        (
            "s = Shape(x)\n a = Constant<value=int64[1] {1}>()\n"
            "e = Constant<value=int64[1] {9}>()\n y = Slice(s, a, e)",
            [4, 5],
        ),
        (
            "s = Shape(x)\n a = Constant<value=int64[1] {-1}>()\n"
            "e = Constant<value=int64[1] {0}>()\n z = Constant<value=int64[1] {0}>()\n"
            "y = Slice(s, a, e, z, a)",
            [5, 4],
        ),
    ],
)
def test_known_axes_of_a_dynamic_tensor(nodes, values):
    text = f"g (float[B,4,5] x) => (int64[N] out) {{ {nodes}\n out = Identity(y) }}"
    graph = parse_graph(HEAD + text)
    assert check_pass(FoldConstants(), graph).rewritten >= 1
    np.testing.assert_array_equal(constants(graph)["y"], values)
    assert [node.op for node in graph.nodes] == ["Identity"]


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Shape(x)",
        "s = Shape(x)\n i = Constant<value=int64[1] {0}>()\n y = Gather(s, i)",
        "s = Shape(x)\n a = Constant<value=int64[1] {0}>()\n"
        "e = Constant<value=int64[1] {2}>()\n y = Slice(s, a, e)",
    ],
)
def test_an_unknown_axis_stays_a_question(nodes):
    text = f"g (float[B,4] x) => (int64[N] out) {{ {nodes}\n out = Identity(y) }}"
    graph = parse_graph(HEAD + text)
    check_pass(FoldConstants(), graph)
    assert "Shape" in [node.op for node in graph.nodes]


def refused(text, **weights):
    result = FoldConstants().apply(parse_graph(HEAD + text, **weights))
    assert (result.matched, result.rewritten) == (1, 0)
    return result.refusals[0].reason


def test_large_results_are_refused():
    text = """g (float[200,300] x) => (float[200,300] y)
      <int64[2] s = {200, 300}, float[1] o = {1}> {
      e = Expand(o, s)
      y = Mul(x, e) }"""
    assert refused(text) == "its result 'e' would have more than 65536 bytes"


def test_large_weights_are_refused_and_not_read():
    text = "g (float[B,200] x) => (float[B,300] y) { t = Transpose(w)\n y = MatMul(x, t) }"

    def read():
        raise AssertionError("a large weight was read")

    graph = parse_graph(HEAD + text, w=np.zeros((300, 200), np.float32))
    graph.tensors()["w"].values = DeferredValues((300, 200), np.float32, read)
    result = FoldConstants().apply(graph)
    assert result.rewritten == 0
    assert result.refusals[0].reason == "'w' has more than 65536 bytes"


def test_the_shape_of_a_large_weight_is_known_without_reading_it():
    text = """g (float[B] x) => (float[A,B] y) { s = Shape(w)
      o = Shape(s)
      p = Concat<axis=0>(o, o)
      y = Expand(x, p) }"""
    graph = parse_graph(HEAD + text, w=np.zeros((1, 1), np.float32))
    graph.tensors()["w"].values = DeferredValues((300, 200), np.float32, lambda: None)
    assert FoldConstants().apply(graph).rewritten == 3
    np.testing.assert_array_equal(constants(graph)["p"], [2, 2])


def test_an_output_of_the_graph_is_refused():
    text = "g (float[B] x) => (float[B] y, float[2] z) <float[2] a = {1, 2}> {"
    text += "z = Neg(a)\n y = Abs(x) }"
    assert refused(text) == "its result 'z' is an output of the graph"


def test_a_node_is_refused_once():
    text = """g (int64[1] x) => (int64[1] y, int64[1] z) <int64[1] a = {7}, int64[1] b = {1}> {
      q = Neg(a)
      r = Abs(b)
      y = Add(q, r)
      z = Neg(x) }"""
    result = FoldConstants().apply(parse_graph(HEAD + text))
    assert (result.matched, result.rewritten) == (3, 2)
    assert result.refusals[0].reason == "its result 'y' is an output of the graph"


INT4 = np.arange(-8, 8).reshape(2, 8).astype(ml_dtypes.int4)


@pytest.mark.parametrize(
    ("nodes", "weight", "reason"),
    [
        ("d = Transpose(f)\n f = Cast<to=1>(w)", INT4, "'w' holds int4 values"),
        ("d = Cast<to=1>(t)\n t = Transpose(w)", INT4, "'w' holds int4 values"),
        ("d = Cast<to=1>(i)\n i = Cast<to=22>(w)", np.ones(2), "'i' holds int4 values"),
    ],
)
def test_values_of_4_bits_are_refused(nodes, weight, reason):
    text = f"g (float[8,2] x) => (float[8,2] y) {{ {nodes}\n y = Add(x, d) }}"
    graph = import_graph(onnx.parser.parse_model(HEAD + text))
    held = DeferredValues(weight.shape, weight.dtype, lambda: weight)
    graph.tensors()["w"].to_constant(held)
    graph.toposort()
    infer_types(graph)
    result = FoldConstants().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert result.refusals[0].reason == reason


def test_text_is_refused():
    text = "g (int64[2] x) => (string[2] y) <float[2] a = {1, 2}> {"
    text += "t = Cast<to=8>(a)\n u = Cast<to=8>(x)\n y = StringConcat(t, u) }"
    assert refused(text) == "'t' holds text"


def test_a_graph_without_recorded_types():
    text = (
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { n = Neg(a)\n y = Add(x, n) }"
    )
    graph = import_graph(onnx.parser.parse_model(HEAD + text))
    assert graph.tensors()["n"].dtype is None
    assert check_pass(FoldConstants(), graph).rewritten == 1


def test_sizes_that_only_running_tells_are_refused():
    text = "g (float[B] x) => (float[C] y) <float[2] a = {1, 0}> {"
    text += "n = NonZero(a)\n f = Squeeze(n)\n y = Gather(x, f) }"
    assert "the size of 'n' is not known beforehand" in refused(text)


def test_constants_that_the_caller_may_give_are_no_constants():
    text = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {n = Neg(a)\n y = Add(x, n) }"
    graph = parse_graph(HEAD + text)
    graph.inputs.append(graph.tensors()["a"])
    assert FoldConstants().run(graph).matched == 0


@pytest.mark.parametrize(
    "nodes",
    [
        "d = DequantizeLinear(q, s)\n y = Mul(x, d)",
        "f = Cast<to=1>(q)\n r = QuantizeLinear(f, s)\n t = Cast<to=1>(r)\n y = Mul(x, t)",
        "r = RandomNormal<shape=[4]>()\n y = Mul(x, r)",
        "r = RandomNormalLike(s4)\n y = Mul(x, r)",
    ],
    ids=["dequantize", "quantize", "random", "random-like"],
)
def test_quantizers_and_random_numbers_stay(nodes):
    text = "g (float[4] x) => (float[4] y)"
    text += "<int8[4] q = {1,2,3,4}, float s = {0.5}, float[4] s4 = {1,2,3,4}> {" + nodes + "}"
    graph = parse_graph(HEAD + text)
    kinds = {node.op for node in graph.nodes}
    FoldConstants().apply(graph)
    assert {node.op for node in graph.nodes} >= kinds - {"Cast"}


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=5), st.integers(1, 3))
def test_arithmetic_of_any_constants(numbers, scale):
    text = f"""g (float[B] x) => (float[N] y) <float[{len(numbers)}] a, float s> {{
      b = Mul(a, s)
      c = Add(b, a)
      d = Cast<to=1>(c)
      y = Concat<axis=0>(x, d) }}"""
    weights = {"a": np.array(numbers, np.float32), "s": np.array(scale, np.float32)}
    graph = parse_graph(HEAD + text, **weights)
    assert check_pass(FoldConstants(), graph).rewritten == 3
    np.testing.assert_array_equal(constants(graph)["d"], weights["a"] * (scale + 1))


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_captured_graphs_are_folded_already(name):
    assert FoldConstants().apply(nano_graph(name)).matched == 0
