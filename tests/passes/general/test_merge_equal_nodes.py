"""Common subexpressions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.general.merge_equal_nodes import MergeEqualNodes
from tests.passes.graphs import assert_same_structure, check_pass, nano_graph, parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BEFORE = (
    HEAD
    + """
g (float[B,4] x) => (float[B,C] y) <int64[1] i = {0}, int64[1] j = {0}, int64[1] m = {-1}> {
  s = Shape(x)
  a = Gather<axis=0>(s, i)
  p = Concat<axis=0>(a, m)
  u = Reshape(x, p)
  t = Shape(x)
  b = Gather<axis=0>(t, j)
  q = Concat<axis=0>(b, m)
  n = Neg(x)
  v = Reshape(n, q)
  y = Concat<axis=1>(u, v)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float[B,4] x) => (float[B,C] y) <int64[1] i = {0}, int64[1] m = {-1}> {
  s = Shape(x)
  a = Gather<axis=0>(s, i)
  p = Concat<axis=0>(a, m)
  u = Reshape(x, p)
  n = Neg(x)
  v = Reshape(n, p)
  y = Concat<axis=1>(u, v)
}
"""
)


def test_before_and_expected():
    graph = parse_graph(BEFORE)
    result = check_pass(MergeEqualNodes(), graph)
    assert (result.matched, result.rewritten) == (3, 3)
    assert_same_structure(graph, parse_graph(EXPECTED))


def two(first, second, outputs="float[B] y", last="y = Sub(a, b)"):
    text = f"g (float[B] x, float[B] z) => ({outputs}) {{ {first}\n {second}\n {last} }}"
    return parse_graph(HEAD + text)


def test_operands_of_a_sum_may_stand_in_either_order():
    graph = two("a = Add(x, z)", "b = Add(z, x)")
    assert check_pass(MergeEqualNodes(), graph).rewritten == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a = Sub(x, z)", "b = Sub(z, x)"),
        ("a = Neg(x)", "b = Neg(z)"),
        ("a = Neg(x)", "b = Abs(x)"),
        ("a = LeakyRelu<alpha=0.1>(x)", "b = LeakyRelu<alpha=0.2>(x)"),
        ("a = RandomNormalLike(x)", "b = RandomNormalLike(x)"),
    ],
    ids=["order", "inputs", "operator", "attributes", "random"],
)
def test_what_differs_is_kept(first, second):
    assert MergeEqualNodes().apply(two(first, second)).matched == 0


def test_quantizers_are_kept():
    text = """g (float[B] x) => (float[B] y) <float s = {0.5}, int8 o = {0}> {
      q = QuantizeLinear(x, s, o)
      a = DequantizeLinear(q, s, o)
      b = DequantizeLinear(q, s, o)
      y = Add(a, b) }"""
    assert MergeEqualNodes().apply(parse_graph(HEAD + text)).matched == 0


def test_nodes_with_a_part_left_out_differ():
    text = """g (float[B] x) => (float[B] y) <float l = {0}> {
      a = Clip(x, l)
      b = Clip(x, , l)
      y = Add(a, b) }"""
    assert MergeEqualNodes().apply(parse_graph(HEAD + text)).matched == 0


@pytest.mark.parametrize("outputs", ["float[B] a, float[B] y", "float[B] b, float[B] y"])
def test_an_output_of_the_graph_keeps_its_name(outputs):
    graph = two("a = Neg(x)", "b = Neg(x)", outputs)
    assert check_pass(MergeEqualNodes(), graph).rewritten == 1


@pytest.mark.parametrize("output", ["a", "b"])
def test_a_graph_without_recorded_types(output):
    graph = two("a = Neg(x)", "b = Neg(x)", f"float[B] {output}, float[B] y")
    inner = graph.tensors()["b" if output == "a" else "a"]
    inner.dtype = inner.shape = None
    assert check_pass(MergeEqualNodes(), graph).rewritten == 1
    assert [tensor.shape for tensor in graph.outputs] == [["B"], ["B"]]


def test_two_outputs_of_the_graph_are_refused():
    graph = two("a = Neg(x)", "b = Neg(x)", "float[B] a, float[B] b, float[B] y")
    result = check_pass(MergeEqualNodes(), graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert "both are outputs of the graph" in result.refusals[0].reason


def test_all_outputs_of_a_split():
    text = """g (float[4] x) => (float[2] y) {
      a, b = Split<axis=0, num_outputs=2>(x)
      c, d = Split<axis=0, num_outputs=2>(x)
      y = Sub(b, d) }"""
    graph = parse_graph(HEAD + text)
    assert check_pass(MergeEqualNodes(), graph).rewritten == 1
    assert [tensor.name for tensor in graph.nodes[-1].inputs] == ["b", "b"]


@given(st.lists(st.sampled_from(["Neg", "Abs", "Relu", "Floor"]), min_size=1, max_size=10))
def test_any_unary_nodes(ops):
    nodes = [f"t{i} = {name}(x)" for i, name in enumerate(ops)]
    total = f"y = Sum({', '.join(f't{i}' for i in range(len(ops)))})"
    text = f"g (float[B] x) => (float[B] y) {{ {' '.join(nodes)} {total} }}"
    graph = parse_graph(HEAD + text)
    assert check_pass(MergeEqualNodes(), graph).rewritten == len(ops) - len(set(ops))


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_captured_graphs_have_none(name):
    assert MergeEqualNodes().apply(nano_graph(name)).matched == 0
