"""Operators that do nothing, and pairs that are one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.general.clean_layout import CleanLayout
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    nano_graph,
    parse_graph,
    run_graph,
)

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BEFORE = (
    HEAD
    + """
g (float[B,4,6] x) => (float[B,6,2,2] y)
  <int64[3] same = {-1, 4, 6}, int64[4] cut = {-1, 2, 2, 6}, float one = {1}> {
  r = Reshape(x, same)
  i = Identity(r)
  m = Mul(i, one)
  s = Reshape(m, cut)
  t = Transpose<perm=[0,2,1,3]>(s)
  y = Transpose<perm=[0,3,1,2]>(t)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float[B,4,6] x) => (float[B,6,2,2] y) <int64[4] cut = {-1, 2, 2, 6}> {
  s = Reshape(x, cut)
  y = Transpose<perm=[0,3,2,1]>(s)
}
"""
)


def parse(nodes, inputs="float[B,4,6] x", outputs="float[B,4,6] y", consts="", **weights):
    consts = f"<{consts}>" if consts else ""
    return parse_graph(f"{HEAD} g ({inputs}) => ({outputs}) {consts} {{ {nodes} }}", **weights)


def ops(graph):
    return [node.op for node in graph.nodes]


def test_before_and_expected():
    graph = parse_graph(BEFORE)
    result = check_pass(CleanLayout(), graph)
    assert (result.matched, result.rewritten) == (4, 4)
    assert_same_structure(graph, parse_graph(EXPECTED))


INT64_MAX = 2**63 - 1


@pytest.mark.parametrize(
    ("node", "consts"),
    [
        ("b = Identity(a)", ""),
        ("b = Dropout(a)", ""),
        ("b = Dropout(a, r, t)", "float r = {0.5}, bool t = {0}"),
        ("b = Cast<to=1>(a)", ""),
        ("b = Concat<axis=1>(a)", ""),
        ("b = Reshape(a, s)", "int64[3] s = {0, 4, -1}"),
        ("b = Transpose<perm=[0,1,2]>(a)", ""),
        ("b = Expand(a, s)", "int64[2] s = {4, 1}"),
        ("b = Slice(a, z, e)", f"int64[1] z = {{0}}, int64[1] e = {{{INT64_MAX}}}"),
        ("b = Slice(a, z, e, o)", "int64[1] z={0}, int64[1] e = {6}, int64[1] o = {-1}"),
        ("b = Mul(one, a)", "float one = {1}"),
        ("b = Mul(a, one)", "float[4,1] one = {1,1,1,1}"),
        ("b = Div(a, one)", "float one = {1}"),
        ("c = Unsqueeze(a, k)\n b = Squeeze(c, l)", "int64[1] k = {-1}, int64[1] l = {3}"),
        ("c = Unsqueeze(a, k)\n b = Squeeze(c, k)", "int64[2] k = {0,2}"),
        ("c = Reshape(a, s)\n b = Reshape(c, t)", "int64[1] s={-1}, int64[3] t={-1,4,6}"),
        ("c = Transpose<perm=[1,2,0]>(a)\n b = Transpose<perm=[2,0,1]>(c)", ""),
        ("c = Transpose(a)\n b = Transpose(c)", ""),
    ],
)
def test_what_does_nothing_goes(node, consts):
    graph = parse(f"a = Neg(x)\n {node}\n y = Abs(b)", consts=consts)
    assert check_pass(CleanLayout(), graph).rewritten >= 1
    assert [op for op in ops(graph) if op != "Constant"] == ["Neg", "Abs"]


@pytest.mark.parametrize(
    ("node", "consts", "shape"),
    [
        ("b = Cast<to=10>(a)", "", "float16[B,4,6]"),
        ("b = Reshape(a, s)", "int64[3] s = {-1, 6, 4}", "float[B,6,4]"),
        ("b = Transpose<perm=[0,2,1]>(a)", "", "float[B,6,4]"),
        ("b = Expand(a, s)", "int64[4] s = {2,1,1,1}", "float[2,B,4,6]"),
        ("b = Expand(a, s)", "int64[3] s = {3,1,1}", "float[3,4,6]"),
        ("b = Slice(a, z, e)", "int64[1] z={0}, int64[1] e={100}", "float[C,4,6]"),
        (
            "b = Slice(a, z, e, o)",
            "int64[1] z={0}, int64[1] e={5}, int64[1] o={2}",
            "float[B,4,5]",
        ),
        (
            "b = Slice(a, z, e, o, p)",
            "int64[1] z={0}, int64[1] e={9}, int64[1] o={2}, int64[1] p={2}",
            "float[B,4,3]",
        ),
        ("b = Mul(a, two)", "float two = {2}", "float[B,4,6]"),
        ("b = Mul(a, one)", "float[3,1,1] one = {1,1,1}", "float[3,4,6]"),
        ("b = Mul(a, one)", "float[1,1,1,1] one = {1}", "float[1,B,4,6]"),
        ("b = Div(one, a)", "float one = {1}", "float[B,4,6]"),
        ("b = Sub(nil, a)", "float nil = {0}", "float[B,4,6]"),
        ("b = Add(a, nil)", "float nil = {0}", "float[B,4,6]"),
    ],
)
def test_what_does_something_stays(node, consts, shape):
    graph = parse(f"a = Neg(x)\n {node}\n y = Abs(b)", outputs=f"{shape} y", consts=consts)
    assert check_pass(CleanLayout(), graph).matched == 0


def test_two_unknown_axes_may_be_another_shape():
    graph = parse(
        "a = Neg(x)\n b = Reshape(a, s)\n y = Abs(b)",
        "float[B,C,6] x, int64[3] s",
        "float[D,E,6] y",
    )
    assert CleanLayout().apply(graph).matched == 0


@pytest.mark.parametrize(
    ("target", "expected"), [("{-1, 8}", [-1, 8]), ("{0, 0}", [-1, 8]), ("{0, -1}", [-1, 8])]
)
def test_reshapes_in_a_row(target, expected):
    graph = parse(
        "a = Neg(x)\n b = Reshape(a, s)\n y = Reshape(b, t)",
        "float[B,4,6] x",
        "float[C,8] y",
        f"int64[2] s = {{-1, 8}}, int64[2] t = {target}",
    )
    assert check_pass(CleanLayout(), graph).rewritten == 1
    assert ops(graph) == ["Neg", "Reshape"]
    np.testing.assert_array_equal(graph.nodes[1].inputs[1].values, expected)


def test_zeros_of_a_reshape_are_the_axes_it_saw():
    graph = parse(
        "a = Neg(x)\n b = Reshape(a, s)\n y = Reshape(b, t)",
        "float[B,4,6] x",
        "float[C,2,3,4] y",
        "int64[3] s = {-1, 2, 12}, int64[4] t = {0, 0, 3, -1}",
    )
    assert check_pass(CleanLayout(), graph).rewritten == 1
    np.testing.assert_array_equal(graph.nodes[1].inputs[1].values, [-1, 2, 3, 4])


def test_a_reshape_that_copies_unknown_axes_is_refused():
    graph = parse(
        "k = Constant<value=int64[1] {3}>()\n b = Unsqueeze(x, k)\n y = Reshape(b, t)",
        "float[B,C,6] x",
        "float[B,C,2,3] y",
        "int64[4] t = {0, 0, 2, 3}",
    )
    result = check_pass(CleanLayout(), graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert "copies axes" in result.refusals[0].reason


@pytest.mark.parametrize(
    ("pair", "shape"),
    [
        ("b = Transpose<perm=[1,0,2]>(x)\n y = Transpose<perm=[1,2,0]>(b)", "float[B,6,4]"),
        ("b = Reshape(x, s)\n y = Reshape(b, t)", "float[D,3,8]"),
    ],
)
@pytest.mark.parametrize("elsewhere", ["z = Neg(b)", "z = Identity(b)"])
def test_an_inner_tensor_that_is_read_elsewhere_is_kept(pair, shape, elsewhere):
    kind = "float[4,B,6]" if "perm" in pair else "float[C,12]"
    nodes, outputs = pair, f"{shape} y, {kind} b"
    if "Neg" in elsewhere:
        nodes, outputs = f"{pair}\n {elsewhere}", f"{shape} y, {kind} z"
    consts = "int64[2] s = {-1, 12}, int64[3] t = {-1, 3, 8}"
    graph = parse(nodes, outputs=outputs, consts=consts)
    before = ops(graph)
    result = check_pass(CleanLayout(), graph)
    assert (result.matched, result.rewritten) == (1, 0)
    reason = "also read by Neg" if "Neg" in elsewhere else "is an output of the graph"
    assert f"'b' between them {reason}" in result.refusals[0].reason.replace("is also", "also")
    assert ops(graph) == before


def test_inverse_pairs_vanish_though_the_inner_is_read_elsewhere():
    graph = parse(
        "b = Transpose<perm=[1,0,2]>(x)\n c = Transpose<perm=[1,0,2]>(b)\n"
        "z = Neg(b)\n y = Abs(c)",
        outputs="float[B,4,6] y, float[4,B,6] z",
    )
    assert check_pass(CleanLayout(), graph).rewritten == 1
    assert sorted(ops(graph)) == ["Abs", "Neg", "Transpose"]


def test_an_output_of_the_graph_keeps_its_name():
    graph = parse("a = Neg(x)\n y = Identity(a)")
    assert check_pass(CleanLayout(), graph).rewritten == 1
    assert (ops(graph), graph.outputs[0].shape) == (["Neg"], ["B", 4, 6])


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        ("y = Identity(x)", "float[B,4,6] y", "no node makes 'x'"),
        ("a = Neg(x)\n y = Identity(a)", "float[B,4,6] y, float[B,4,6] a", "both outputs"),
        (
            "a, m = Dropout(x)\n y = Abs(a)",
            "float[B,4,6] y, bool[B,4,6] m",
            "mask 'm' is used",
        ),
    ],
)
def test_refusals_at_outputs(nodes, outputs, reason):
    result = check_pass(CleanLayout(), parse(nodes, outputs=outputs))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_a_graph_without_recorded_types():
    graph = parse("a = Neg(x)\n y = Identity(a)")
    graph.tensors()["a"].dtype = graph.tensors()["a"].shape = None
    assert check_pass(CleanLayout(), graph).rewritten == 1
    assert (ops(graph), graph.outputs[0].shape) == (["Neg"], ["B", 4, 6])


def test_adding_zero_stays_where_the_sign_of_zero_counts():
    graph = parse(
        "a = Add(x, n)\n y = Reciprocal(a)", "float[1] x", "float[1] y", "float n={0}"
    )
    CleanLayout().apply(graph)
    assert run_graph(graph, {"x": np.array([-0.0], np.float32)})["y"] == np.inf


def test_dropout_in_training_is_refused():
    graph = parse(
        "a = Dropout(x, r, t)\n y = Abs(a)", "float[B,4,6] x, bool t", consts="float r = {0.5}"
    )
    assert "training mode" in CleanLayout().apply(graph).refusals[0].reason


@given(st.lists(st.permutations(range(4)), min_size=1, max_size=5), st.integers(1, 3))
def test_any_row_of_transposes(perms, batch):
    nodes = [f"t{i + 1} = Transpose<perm={list(p)}>(t{i})" for i, p in enumerate(perms)]
    graph = parse(
        f"t0 = Neg(x)\n {' '.join(nodes)}\n y = Abs(t{len(perms)})",
        "float[B,2,3,4] x",
        "float[N,M,K,L] y",
    )
    check_pass(CleanLayout(), graph, {"B": batch})
    assert ops(graph).count("Transpose") <= 1


@given(st.lists(st.sampled_from([[-1, 24], [2, -1], [-1, 2, 3], [-1, 4, 6]]), max_size=4))
def test_any_row_of_reshapes(shapes):
    nodes = [f"t{i + 1} = Reshape(t{i}, s{i})" for i in range(len(shapes))]
    graph = parse(
        f"t0 = Neg(x)\n {' '.join(nodes)}\n y = Identity(t{len(shapes)})",
        outputs="float[...] y".replace(
            "[...]", "[" + ",".join("KLM"[: len((shapes or [[0] * 3])[-1])]) + "]"
        ),
        **{f"s{i}": np.array(shape) for i, shape in enumerate(shapes)},
    )
    check_pass(CleanLayout(), graph, {"B": 2})
    assert ops(graph).count("Reshape") <= 1


@pytest.mark.parametrize(
    ("name", "count"), [("vision_encoder", 0), ("projector", 0), ("decoder", 1)]
)
def test_nano(name, count):
    assert check_pass(CleanLayout(), nano_graph(name), image_embeds=0).rewritten == count
