"""Casts that change nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.general.remove_cast_islands import RemoveCastIslands, is_lossless
from tests.passes.graphs import assert_same_structure, check_pass, nano_graph, parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BEFORE = (
    HEAD
    + """
g (float16[B,4,6] x, float16[B,4,6] z) => (float16[B,6,8] y) <int64[3] s = {-1, 6, 4}> {
  a = Cast<to=1>(x)
  b = Cast<to=1>(z)
  p = Reshape(a, s)
  q = Transpose<perm=[0,2,1]>(b)
  c = Concat<axis=2>(p, q)
  d = Cast<to=10>(c)
  y = Neg(d)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float16[B,4,6] x, float16[B,4,6] z) => (float16[B,6,8] y) <int64[3] s = {-1, 6, 4}> {
  p = Reshape(x, s)
  q = Transpose<perm=[0,2,1]>(z)
  c = Concat<axis=2>(p, q)
  y = Neg(c)
}
"""
)


def parse(nodes, inputs="float16[B,4] x", outputs="float16[B,4] y", consts=""):
    consts = f"<{consts}>" if consts else ""
    return parse_graph(f"{HEAD} g ({inputs}) => ({outputs}) {consts} {{ {nodes} }}")


def ops(graph):
    return [node.op for node in graph.nodes]


def test_before_and_expected():
    graph = parse_graph(BEFORE)
    result = check_pass(RemoveCastIslands(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED))
    assert all(t.dtype == np.float16 for n in graph.nodes for t in n.outputs)


def test_there_and_back():
    graph = parse("a = Cast<to=1>(x)\n b = Cast<to=10>(a)\n y = Neg(b)")
    assert check_pass(RemoveCastIslands(), graph).rewritten == 1
    assert ops(graph) == ["Neg"]


def test_the_wide_one_stays_for_others():
    graph = parse(
        "a = Cast<to=1>(x)\n b = Cast<to=10>(a)\n y = Neg(b)\n z = Exp(a)",
        outputs="float16[B,4] y, float[B,4] z",
    )
    assert check_pass(RemoveCastIslands(), graph).rewritten == 1
    assert sorted(ops(graph)) == ["Cast", "Exp", "Neg"]


def test_a_cast_to_the_dtype_that_is_there():
    graph = parse("a = Cast<to=10>(x)\n y = Neg(a)")
    assert check_pass(RemoveCastIslands(), graph).rewritten == 1
    assert ops(graph) == ["Neg"]


def test_a_row_of_casts_is_one():
    graph = parse(
        "a = Cast<to=1>(x)\n b = Cast<to=11>(a)\n y = Cast<to=6>(b)",
        "uint8[B] x",
        "int32[B] y",
    )
    assert check_pass(RemoveCastIslands(), graph).rewritten == 2
    assert ops(graph) == ["Cast"]


def test_two_casts_of_one_tensor_are_one():
    graph = parse(
        "a = Cast<to=1>(x)\n b = Cast<to=1>(x)\n c = Exp(a)\n d = Sin(b)\n y = Add(c, d)",
        outputs="float[B,4] y",
    )
    assert check_pass(RemoveCastIslands(), graph).rewritten == 1
    assert sorted(ops(graph)) == ["Add", "Cast", "Exp", "Sin"]


@pytest.mark.parametrize(
    "outputs", ["float[B,4] a, float[B,4] y", "float[B,4] y, float[B,4] a"]
)
def test_of_two_casts_that_of_an_output_stays(outputs):
    graph = parse("b = Cast<to=1>(x)\n a = Cast<to=1>(x)\n y = Sin(b)", outputs=outputs)
    assert check_pass(RemoveCastIslands(), graph).rewritten == 1
    assert sorted(ops(graph)) == ["Cast", "Sin"]


def test_a_narrowing_is_part_of_the_result():
    graph = parse("a = Cast<to=10>(x)\n y = Cast<to=1>(a)", "float[B] x", "float[B] y")
    result = check_pass(RemoveCastIslands(), graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert (
        result.refusals[0].reason == "'a' is rounded to float16, which is part of the result"
    )


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [(1, 7, "int64"), (6, 1, "float"), (10, 6, "int32")],
    ids=["int64-float32-int64", "float32-int32-float32", "int32-float16-int32"],
)
def test_other_lossy_casts_stay(first, second, kind):
    text = f"a = Cast<to={first}>(x)\n y = Cast<to={second}>(a)"
    graph = parse(text, f"{kind}[B] x", f"{kind}[B] y")
    assert RemoveCastIslands().apply(graph).rewritten == 0


REGION = "a = Cast<to=1>(x)\n b, c = Split<axis=1, num_outputs=2>(a)\n d = Cast<to=10>(b)\n"


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        ("e = Exp(c)\n f = Cast<to=10>(e)\n y = Add(d, f)", "", "'c' is also read by Exp"),
        (
            "e = Cast<to=7>(c)\n z = Neg(e)\n y = Neg(d)",
            "int64[B,2] z",
            "takes what is moved as",
        ),
        ("y = Neg(d)", "float[B,2] c", "'c', which is moved, is an output of the graph"),
    ],
    ids=["computed-with", "another-dtype", "graph-output"],
)
def test_islands_that_do_more_than_move_are_refused(nodes, outputs, reason):
    outputs = "float16[B,2] y" + (f", {outputs}" if outputs else "")
    graph = parse(REGION + nodes, outputs=outputs)
    before = ops(graph)
    result = check_pass(RemoveCastIslands(), graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason
    assert ops(graph) == before


def test_what_comes_from_elsewhere_is_refused():
    graph = parse(
        "a = Cast<to=1>(x)\n b = Concat<axis=1>(a, w)\n y = Cast<to=10>(b)",
        "float16[B,4] x, float[B,4] w",
        "float16[B,8] y",
    )
    result = check_pass(RemoveCastIslands(), graph)
    assert "'w', which is moved along, is no Cast from float16" in result.refusals[0].reason


def test_both_parts_of_a_split():
    graph = parse(REGION + "e = Cast<to=10>(c)\n y = Add(d, e)", outputs="float16[B,2] y")
    assert check_pass(RemoveCastIslands(), graph).rewritten == 2
    assert ops(graph) == ["Split", "Add"]


def test_an_output_of_the_graph_keeps_its_name():
    text = "a = Cast<to=1>(x)\n t = Transpose(a)\n y = Cast<to=10>(t)"
    graph = parse(text, outputs="float16[4,B] y")
    assert check_pass(RemoveCastIslands(), graph).rewritten == 1
    assert ops(graph) == ["Transpose"]


def test_two_outputs_of_the_graph_from_one_moved_tensor_are_refused():
    text = "a = Cast<to=1>(x)\n t = Transpose(a)\n y = Cast<to=10>(t)\n z = Cast<to=10>(t)"
    graph = parse(text, outputs="float16[4,B] y, float16[4,B] z")
    result = check_pass(RemoveCastIslands(), graph)
    assert (result.matched, result.rewritten) == (2, 0)
    assert {r.reason for r in result.refusals} == {"'y' and 'z' are both outputs of the graph"}
    assert [tensor.name for tensor in graph.outputs] == ["y", "z"]


def test_an_output_and_an_inner_tensor_from_one_moved_tensor():
    text = "a = Cast<to=1>(x)\n t = Transpose(a)\n y = Cast<to=10>(t)\n b = Cast<to=10>(t)\n"
    graph = parse(text + "z = Neg(b)", outputs="float16[4,B] y, float16[4,B] z")
    assert check_pass(RemoveCastIslands(), graph).rewritten == 2
    assert [tensor.name for tensor in graph.outputs] == ["y", "z"]


def test_an_output_that_would_be_an_input_is_refused():
    graph = parse("a = Cast<to=1>(x)\n y = Cast<to=10>(a)")
    result = check_pass(RemoveCastIslands(), graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert "no node makes 'x'" in result.refusals[0].reason


@pytest.mark.parametrize(
    ("source", "target", "exact"),
    [
        ("float16", "float32", True),
        ("float32", "float16", False),
        ("int8", "float16", True),
        ("int32", "float32", False),
        ("int64", "float64", False),
        ("uint8", "int32", True),
        ("int8", "uint8", False),
        ("bool", "float16", True),
        ("float32", "int64", False),
        ("bfloat16", "float32", True),
        ("float64", "object", False),
        ("object", "object", False),
    ],
)
def test_lossless(source, target, exact):
    assert is_lossless(source, target) is exact


@given(st.lists(st.sampled_from([1, 10, 11]), min_size=1, max_size=6))
def test_any_row_of_float_casts(kinds):
    """Rounding to float16 stays wherever it happened."""
    nodes = [f"t{i + 1} = Cast<to={kind}>(t{i})" for i, kind in enumerate(kinds)]
    last = f"y = Cast<to=1>(t{len(kinds)})"
    graph = parse(f"t0 = Neg(x)\n {' '.join(nodes)} {last}", "float[B] x", "float[B] y")
    check_pass(RemoveCastIslands(), graph, rtol=0)
    assert ops(graph).count("Cast") <= 2


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_captured_graphs_have_none(name):
    assert RemoveCastIslands().apply(nano_graph(name)).matched == 0
