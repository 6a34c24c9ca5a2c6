"""The greedy token as an output."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mvlm_export.passes.decoder.choose_greedy_token import ChooseGreedyToken
from mvlm_export.passes.decoder.keep_last_row import KeepLastRow
from mvlm_export.passes.tensorrt_ops import OP_SETS
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    nano_graph,
    parse_graph,
    random_feeds,
    run_graph,
    tiny_graph,
)

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[1,7] x) => (float[1,7] logits) {
  logits = Identity(x)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[1,7] x) => (float[1,7] logits, int64[1] next_token) {
  logits = Identity(x)
  likeliest = ArgMax<axis=-1, keepdims=0, select_last_index=0>(logits)
  nan = IsNaN(logits)
  inf = IsInf(logits)
  bad = Or(nan, inf)
  as_int = Cast<to=6>(bad)
  most = ReduceMax<keepdims=0>(as_int, axes)
  any_bad = Cast<to=9>(most)
  next_token = Where(any_bad, minus, likeliest)
}
"""
PARTS = {"axes": np.array([1], np.int64), "minus": np.array([-1], np.int64)}


def test_before_and_expected():
    graph = parse_graph(BEFORE)
    result = check_pass(ChooseGreedyToken(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, **PARTS))
    assert [output.name for output in graph.outputs] == ["logits", "next_token"]


def test_the_first_of_equal_logits_wins():
    graph = parse_graph(BEFORE)
    ChooseGreedyToken().apply(graph)
    x = np.array([[0, 3, -1, 3, 3, 2, 0]], np.float32)
    assert run_graph(graph, {"x": x})["next_token"].tolist() == [1]


LOGITS = st.integers(-3, 3)
NOT_FINITE = st.sampled_from([np.nan, np.inf, -np.inf])


@given(x=arrays.arrays(np.float32, (1, 7), elements=LOGITS))
def test_it_is_numpys_argmax(x):
    graph = parse_graph(BEFORE)
    rewrite = ChooseGreedyToken()
    rewrite.apply(graph)
    found = run_graph(graph, {"x": x})
    expected = rewrite.outputs_after({"logits": x}, {"x": x})
    assert found["next_token"].dtype == expected["next_token"].dtype == np.int64
    np.testing.assert_array_equal(found["next_token"], expected["next_token"])
    assert found["next_token"] == x.argmax()


@given(x=arrays.arrays(np.float32, (1, 7), elements=LOGITS | NOT_FINITE))
def test_any_logit_that_is_not_finite_gives_minus_one(x):
    graph = parse_graph(BEFORE)
    rewrite = ChooseGreedyToken()
    rewrite.apply(graph)
    token = x.argmax() if np.isfinite(x).all() else -1
    assert run_graph(graph, {"x": x})["next_token"].tolist() == [token]
    assert rewrite.outputs_after({"logits": x}, {})["next_token"].tolist() == [token]


ROWS = [("float[1,7]", "float[R,7]"), ("int64[1] next_token", "int64[R] next_token")]


def in_rows(text):
    for old, new in ROWS:
        text = text.replace(old, new)
    return text


def test_a_token_for_each_of_the_last_rows():
    graph = parse_graph(in_rows(BEFORE))
    assert check_pass(ChooseGreedyToken(), graph, {"R": 4}).rewritten == 1
    assert_same_structure(graph, parse_graph(in_rows(EXPECTED), **PARTS))
    assert graph.outputs[-1].shape == ["R"]
    assert ChooseGreedyToken().apply(graph).matched == 0


@given(
    x=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 8), st.just(7)), elements=LOGITS | NOT_FINITE
    )
)
def test_each_row_is_judged_alone(x):
    graph = parse_graph(in_rows(BEFORE))
    rewrite = ChooseGreedyToken()
    rewrite.apply(graph)
    tokens = [int(row.argmax()) if np.isfinite(row).all() else -1 for row in x]
    assert run_graph(graph, {"x": x})["next_token"].tolist() == tokens
    assert rewrite.outputs_after({"logits": x}, {})["next_token"].tolist() == tokens


def test_every_tensorrt_reads_it():
    graph = parse_graph(BEFORE)
    ChooseGreedyToken().apply(graph)
    assert all({node.op for node in graph.nodes} <= ops.ops for ops in OP_SETS.values())


def test_a_token_that_something_else_chose_is_left_alone():
    text = EXPECTED.replace("next_token = Where(any_bad, minus, likeliest)", "")
    graph = parse_graph(text.replace("likeliest", "next_token"), axes=PARTS["axes"])
    result = ChooseGreedyToken().apply(graph)
    assert "is taken" in result.refusals[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("[1,7]", "[S,7]"), "'logits' is ['S', 7], not one row [1, V]; keep-last-row must"),
        (("[1,7]", "[2,7]"), "not one row"),
        (("[1,7]", "[1,1,7]"), "not one row"),
        (("Identity(x)", "Identity(next_token)\n  next_token = Relu(x)"), "is taken"),
    ],
    ids=["rows", "two-rows", "rank-3", "name"],
)
def test_refusals(change, reason):
    text = BEFORE.replace(*change)
    if "Relu" in text:
        text = text.replace("  logits = Identity(next_token)\n", "").replace("\n}", "")
        text += "  logits = Identity(next_token)\n}"
    result = ChooseGreedyToken().apply(parse_graph(text))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_no_logits_is_no_match():
    assert ChooseGreedyToken("scores").apply(parse_graph(BEFORE)).matched == 0
    outputs = {"present": np.ones(3)}
    assert ChooseGreedyToken().outputs_after(outputs, {}) == outputs


@pytest.mark.parametrize("heads", [4, 2])
def test_the_captured_decoder(heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    assert "keep-last-row" in ChooseGreedyToken().apply(graph).refusals[0].reason
    KeepLastRow().apply(graph)
    assert check_pass(ChooseGreedyToken(), graph, input_ids=320).rewritten == 1


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_the_captured_decoder_with_several_rows(rows):
    graph = tiny_graph("decoder")
    KeepLastRow(count=4).apply(graph)
    sizes = {"S": rows}
    assert check_pass(ChooseGreedyToken(), graph, sizes, input_ids=320).rewritten == 1
    found = run_graph(graph, random_feeds(graph, sizes, input_ids=320))
    assert found["next_token"].shape == (min(rows, 4),)
    np.testing.assert_array_equal(found["next_token"], found["logits"].argmax(-1))


def test_nano():
    graph = nano_graph("decoder")
    KeepLastRow().apply(graph)
    assert check_pass(ChooseGreedyToken(), graph, {"S": 5}, input_ids=512).rewritten == 1
    assert graph.outputs[-1].name == "next_token"
