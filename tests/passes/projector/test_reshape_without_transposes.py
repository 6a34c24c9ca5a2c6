"""Between a channels-last map and tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.editing import consumers
from mvlm_export.passes.projector.move_block_to_channels_last import MoveBlockToChannelsLast
from mvlm_export.passes.projector.reshape_without_transposes import ReshapeWithoutTransposes
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    nano_graph,
    parse_graph,
    random_feeds,
    run_graph,
    tiny_graph,
)

TO_TOKENS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,3,4,5] x) => (float[B,12,5] y) <int64[3] s = {-1, 5, 12}> {
  t = Transpose<perm=[0,3,1,2]>(x)
  r = Reshape<allowzero=1>(t, s)
  y = Transpose<perm=[0,2,1]>(r)
}
"""
TO_MAP = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,12,5] x) => (float[B,3,4,5] y) <int64[4] s = {-1, 5, 3, 4}> {
  t = Transpose<perm=[0,2,1]>(x)
  r = Reshape<allowzero=1>(t, s)
  y = Transpose<perm=[0,2,3,1]>(r)
}
"""
EXPECTED_TOKENS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,3,4,5] x) => (float[B,12,5] y) <int64[3] s = {-1, 12, 5}> {
  y = Reshape<allowzero=1>(x, s)
}
"""
EXPECTED_MAP = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,12,5] x) => (float[B,3,4,5] y) <int64[4] s = {-1, 3, 4, 5}> {
  y = Reshape<allowzero=1>(x, s)
}
"""
KINDS = {
    "ldpnetv2": 0,
    "ldpnetv2_nopool": 0,
    "pw2_pool": 0,
    "pw2_pool_pos": 0,
    "ldpnet": 1,
    "mlp2x_gelu": 0,
}


@pytest.mark.parametrize(
    ("before", "expected"),
    [(TO_TOKENS, EXPECTED_TOKENS), (TO_MAP, EXPECTED_MAP)],
    ids=["tokens", "map"],
)
def test_before_and_expected(before, expected):
    graph = parse_graph(before)
    result = check_pass(ReshapeWithoutTransposes(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(expected))


def test_what_is_replaced_reads_nothing():
    graph = parse_graph(TO_TOKENS)
    ReshapeWithoutTransposes().run(graph)
    assert [node.op for node in consumers(graph.inputs[0])] == ["Reshape"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("(t, s)", "(t, k)"), ("> {", "> {\n  k = Identity(s)")], "sizes 'k' are computed"),
        ([("{-1, 5, 12}", "{-1, 10, 6}")], "mixes channels"),
        ([("[B,3,4,5] x", "[B,H,4,5] x")], "are not known"),
        ([("\n}", "\n  z = Neg(t)\n}")], "'t' inside it is also read by Neg"),
        ([("\n}", "\n  z = Neg(r)\n}")], "'r' inside it is also read by Neg"),
        ([("float[B,P,Q] y)", "float[B,P,Q] y, float[B,5,12] r)")], "also an output"),
    ],
    ids=["computed", "mixed", "dynamic", "map-read", "rows-read", "output"],
)
def test_refusals(changes, reason):
    text = TO_TOKENS.replace("[B,12,5] y", "[B,P,Q] y")
    for change in changes:
        assert change[0] in text
        text = text.replace(*change, 1)
    if "z =" in text:
        axes = "M,N,O,L" if "Neg(t)" in text else "M,N,O"
        text = text.replace(" y)", f" y, float[{axes}] z)")
    result = ReshapeWithoutTransposes().apply(parse_graph(text))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@pytest.mark.parametrize("perm", ["[0,3,2,1]", "[0,2,3,1]"])
def test_other_permutations_are_no_match(perm):
    text = TO_TOKENS.replace("[0,3,1,2]", perm).replace("[B,12,5] y", "[B,P,Q] y")
    assert ReshapeWithoutTransposes().apply(parse_graph(text)).matched == 0


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3), batch=st.integers(1, 3), tokens=st.booleans()
)
def test_any_size_to_the_bit(sizes, batch, tokens):
    height, width, channels = sizes
    count = height * width
    text = (
        (TO_TOKENS if tokens else TO_MAP)
        .replace("[B,3,4,5]", f"[B,{height},{width},{channels}]")
        .replace("[B,12,5]", f"[B,{count},{channels}]")
        .replace("{-1, 5, 12}", f"{{-1, {channels}, {count}}}")
        .replace("{-1, 5, 3, 4}", f"{{-1, {channels}, {height}, {width}}}")
    )
    graph = parse_graph(text)
    before = graph.copy()
    assert check_pass(ReshapeWithoutTransposes(), graph, {"B": batch}).rewritten == 1
    feeds = random_feeds(graph, {"B": batch})
    np.testing.assert_array_equal(run_graph(graph, feeds)["y"], run_graph(before, feeds)["y"])


@pytest.mark.parametrize(("kind", "count"), KINDS.items())
def test_the_captured_projectors(kind, count):
    graph = tiny_graph("projector", mm_projector_type=kind)
    result = check_pass(ReshapeWithoutTransposes(), graph)
    assert (result.matched, result.rewritten) == (count, count)


def test_behind_the_channels_last_block():
    graph = tiny_graph("projector", mm_projector_type="ldpnet")
    assert check_pass(MoveBlockToChannelsLast(), graph).rewritten == 2
    assert check_pass(ReshapeWithoutTransposes(), graph).rewritten == 1
    operators = [node.op for node in graph.nodes]
    assert operators[-2:] == ["LayerNormalization", "Reshape"]
    assert operators.count("Transpose") == 4


def test_nano_has_none():
    assert check_pass(ReshapeWithoutTransposes(), nano_graph("projector")).matched == 0
