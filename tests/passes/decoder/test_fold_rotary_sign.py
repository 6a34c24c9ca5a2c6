"""The sign of the rotary embedding in its sine table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.decoder.fold_rotary_sign import FoldRotarySign
from mvlm_export.passes.deferred import is_deferred
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    tiny_graph,
)

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,2,6] q, float[S,1,6] k, int64[S] pos) => (float[S,2,6] y, float[S,1,6] z)
  <float[9,6] table, int64[1] axis = {-2}> {
  rows = Gather<axis=0>(table, pos)
  sin = Unsqueeze(rows, axis)
  q1, q2 = Split<axis=2, num_outputs=2>(q)
  qn = Neg(q2)
  qj = Concat<axis=-1>(qn, q1)
  y = Mul(qj, sin)
  k1, k2 = Split<axis=2, num_outputs=2>(k)
  kn = Neg(k2)
  kj = Concat<axis=2>(kn, k1)
  z = Mul(sin, kj)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,2,6] q, float[S,1,6] k, int64[S] pos) => (float[S,2,6] y, float[S,1,6] z)
  <float[9,6] table, int64[1] axis = {-2}> {
  rows = Gather<axis=0>(table, pos)
  sin = Unsqueeze(rows, axis)
  q1, q2 = Split<axis=2, num_outputs=2>(q)
  qj = Concat<axis=-1>(q2, q1)
  y = Mul(qj, sin)
  k1, k2 = Split<axis=2, num_outputs=2>(k)
  kj = Concat<axis=2>(k2, k1)
  z = Mul(sin, kj)
}
"""


def table(rows=9, width=6, seed=0):
    generator = np.random.default_rng(seed)
    return {"table": generator.standard_normal((rows, width), dtype=np.float32)}


def test_before_and_expected():
    graph = parse_graph(BEFORE, **table())
    result = check_pass(FoldRotarySign(), graph, rtol=0, pos=9)
    assert (result.matched, result.rewritten) == (2, 2)
    assert_same_structure(graph, parse_graph(EXPECTED, **table()))


def test_the_first_half_is_negated_and_the_table_left_alone():
    given_table = table()
    graph = parse_graph(BEFORE, **given_table)
    FoldRotarySign().apply(graph)
    signed = constants(graph)["table.signed"]
    np.testing.assert_array_equal(signed[:, :3], -given_table["table"][:, :3])
    np.testing.assert_array_equal(signed[:, 3:], given_table["table"][:, 3:])
    np.testing.assert_array_equal(given_table["table"], table()["table"])


def test_a_table_gathered_twice_changes_once():
    text = BEFORE.replace("Mul(sin, kj)", "Mul(sin2, kj)").replace(
        "  q1,",
        "  rows2 = Gather<axis=0>(table, pos)\n  sin2 = Unsqueeze(rows2, axis)\n  q1,",
        1,
    )
    graph = parse_graph(text, **table())
    assert check_pass(FoldRotarySign(), graph, rtol=0, pos=9).rewritten == 2
    assert [name for name in constants(graph) if "table" in name] == ["table.signed"]


def test_a_neg_that_is_read_elsewhere_stays():
    text = BEFORE.replace("[S,1,6] z)", "[S,1,6] z, float[S,2,3] qn)")
    graph = parse_graph(text, **table())
    assert check_pass(FoldRotarySign(), graph, rtol=0, pos=9).rewritten == 2
    assert [node.op for node in graph.nodes].count("Neg") == 1


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Mul(sin, kj)", "Mul(sin, k)", "'sin' is also read by Mul"),
        ("Mul(sin, kj)", "Mul(sin, kj)\n  v = Relu(rows)", "'rows' is also read by Relu"),
        ("Mul(sin, kj)", "Mul(sin, kj)\n  v = Relu(table)", "'table' is also read by Relu"),
        ("Mul(sin, kj)", "Mul(sin, kj)\n  v = Relu(qj)", "'qj' is also read elsewhere"),
        ("[S,1,6] z)", "[S,1,6] z, float[S,6] rows)", "'rows' is also an output of the graph"),
        ("[S,1,6] z)", "[S,1,6] z, float[S,2,6] qj)", "'qj' is also an output of the graph"),
        ("int64[S] pos)", "int64[S] pos, float[9,6] table)", "'table' is an input of the"),
        ("Gather<axis=0>(table", "Gather<axis=0>(t2", "the table 't2' is computed by Relu"),
        ("  sin = Un", "  s0 = Transpose(cols)\n  sin = Un", "computed by Transpose"),
        ("Gather<axis=0>(table, pos)", "Gather<axis=1>(table, six)", "is also read by Gather"),
        ("num_outputs=2>(q)", "num_outputs=2>(q)", "does not join two halves of 6"),
    ],
    ids=[
        "other-mul", "rows", "table", "join", "output", "join-output", "input", "computed",
        "transposed", "columns", "halves",
    ],
)  # fmt: skip
def test_refusals(old, new, reason):
    text, given_table = BEFORE.replace(old, new), table()
    if "v = Relu" in new:
        text = text.replace("[S,1,6] z)", "[S,1,6] z, float v)")
        text = text.replace("float v", f"float{'[S,2,6]' if 'qj' in new else '[M,6]'} v")
    if "input" in reason:
        text, given_table = text.replace("<float[9,6] table, ", "<"), {}
    if "t2" in new:
        text = text.replace("  rows =", "  t2 = Relu(table)\n  rows =")
    if "cols" in new:
        text = text.replace("rows = Gather<axis=0>(table, pos)", "cols = Relu(turned)")
        text = text.replace("Unsqueeze(rows", "Unsqueeze(s0").replace(
            "[9,6] table", "[6,3] turned"
        )
        text, given_table = text, {"turned": np.ones((6, 3), np.float32)}
    if "six" in new:
        text = text.replace("<float", "<int64[6] six = {5,4,3,2,1,0}, float").replace(
            "[9,", "[3,"
        )
        given_table = table(3)
    if "halves" in reason:
        text = text.replace("num_outputs=2>(q)", "num_outputs=2>(q, 2-4)").replace(
            "Split<axis=2, num_outputs=2>(q, 2-4)", "Split<axis=2>(q, parts)"
        )
        text = text.replace("<float", "<int64[2] parts = {2,4}, float")
    result = FoldRotarySign().apply(parse_graph(text, **given_table))
    assert result.rewritten == 0
    assert result.matched in (1, 2)
    assert reason in result.refusals[0].reason


def test_a_half_that_is_negated_twice_is_refused():
    text = BEFORE.replace("qn = Neg(q2)", "q3 = Neg(q2)\n  qn = Neg(q3)")
    result = check_pass(FoldRotarySign(), parse_graph(text, **table()), rtol=0, pos=9)
    assert (result.matched, result.rewritten) == (2, 0)
    assert result.refusals[0].reason == "'q3' is negated twice"


def test_another_op_or_order_is_no_match():
    for change in (("Mul(", "Div("), ("Concat<axis=-1>(qn, q1)", "Concat<axis=-1>(q1, qn)")):
        text = BEFORE.replace(*change).replace("(kn, k1)", "(k1, kn)")
        assert FoldRotarySign().apply(parse_graph(text, **table())).matched == 0


@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    half=st.integers(1, 5),
    positions=st.integers(1, 12),
    rows=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_size(heads, half, positions, rows, seed):
    width = 2 * half
    text = BEFORE.replace("2,6]", f"{heads[0]},{width}]").replace("[9,6]", f"[{positions},6]")
    text = text.replace("1,6]", f"{heads[1]},{width}]").replace(",6]", f",{width}]")
    graph = parse_graph(text, **table(positions, width, seed))
    sizes = {"S": rows}
    assert check_pass(FoldRotarySign(), graph, sizes, rtol=0, pos=positions).rewritten == 2


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_the_captured_decoder(heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    assert check_pass(FoldRotarySign(), graph, rtol=0, input_ids=320).rewritten == 4
    assert not any(node.op == "Neg" for node in graph.nodes)


def test_nano():
    graph = nano_graph("decoder")
    sin = constants(graph)["rotary_sin"]
    assert check_pass(FoldRotarySign(), graph, rtol=0, input_ids=512).rewritten == 8
    assert is_deferred(graph.tensors()["rotary_sin.signed"])
    signed = constants(graph)["rotary_sin.signed"]
    np.testing.assert_array_equal(signed, np.concatenate([-sin[:, :32], sin[:, 32:]], 1))
