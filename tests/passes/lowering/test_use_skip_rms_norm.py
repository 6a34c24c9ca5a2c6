"""Residual sum and RMS norm in ONNX Runtime's one operator."""

import re

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.graph_io import to_model
from mvlm_export.passes.lowering.use_skip_rms_norm import UseSkipRmsNorm
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    nano_config,
    nano_graph,
    parse_graph,
)

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,8] a, float[S,8] b) => (float[S,8] y, float[S,8] next)
  <float[8] w, float epsilon = {0.25}, int64[1] last = {-1}> {
  h = Add(a, b)
  squares = Mul(h, h)
  mean = ReduceMean<keepdims=1>(squares, last)
  variance = Add(mean, epsilon)
  deviation = Sqrt(variance)
  factor = Reciprocal(deviation)
  normed = Mul(h, factor)
  weighted = Mul(normed, w)
  y = Relu(weighted)
  next = Sub(h, y)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[S,8] a, float[S,8] b) => (float[S,8] y, float[S,8] next) <float[8] w> {
  normed, mean, deviation, h = com.microsoft.SkipSimplifiedLayerNormalization
    <epsilon=0.25>(a, b, w)
  y = Relu(normed)
  next = Sub(h, y)
}
"""
FOLDED = [("  weighted = Mul(normed, w)\n", ""), ("Relu(weighted)", "Relu(normed)")]


def graph_of(*changes, text=BEFORE, values=None):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    if "w)" not in text:
        return parse_graph(re.sub(r"float\[\d+\] w, ", "", text))
    return parse_graph(text, w=weights() if values is None else values)


def weights():
    return np.random.default_rng(0).standard_normal(8, dtype=np.float32)


def test_before_and_expected():
    graph = graph_of()
    result = check_pass(UseSkipRmsNorm(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, w=weights()))
    onnx.checker.check_model(to_model(graph), full_check=True)


def test_a_weight_folded_away_becomes_ones():
    graph = graph_of(*FOLDED)
    assert check_pass(UseSkipRmsNorm(), graph).rewritten == 1
    np.testing.assert_array_equal(constants(graph)["normed.ones"], np.ones(8, np.float32))


def test_a_weight_that_has_other_readers_stays_theirs():
    graph = graph_of(("next = Sub(h, y)", "v = Mul(y, w)\n  next = Sub(h, v)"))
    assert check_pass(UseSkipRmsNorm(), graph).rewritten == 1
    np.testing.assert_array_equal(constants(graph)["w"], weights())


def test_a_norm_with_two_readers_is_weighted_by_ones():
    graph = graph_of(("y = Relu(weighted)", "r = Relu(weighted)\n  y = Mul(r, normed)"))
    assert check_pass(UseSkipRmsNorm(), graph).rewritten == 1
    assert {node.op for node in graph.nodes} >= {"Mul", "SkipSimplifiedLayerNormalization"}


def test_outputs_of_the_graph_keep_their_names():
    graph = graph_of(("(float[S,8] y,", "(float[S,8] y, float[S,8] h, float[S,8] weighted,"))
    assert check_pass(UseSkipRmsNorm(), graph).rewritten == 1
    assert [tensor.name for tensor in graph.outputs] == ["y", "h", "weighted", "next"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("h = Add(a, b)", "h = Sub(a, b)")], "'h' is no sum"),
        ([("float[S,8] b", "float[8] b")], "'a' and 'b' are not rows of one width"),
        ([("float[S,8] b", "float[S,1] b")], "'a' and 'b' are not rows of one width"),
        ([("last = {-1}", "last = {0}")], "is not over the last axis"),
        ([("Sub(h, y)", "Sub(h, mean)")], "'mean' inside it is also read by Sub"),
        (
            [("float epsilon = {0.25}", "float[8] epsilon = {1, 1, 1, 1, 1, 1, 1, 1}")],
            "'epsilon' is not one",
        ),
        (
            [
                ("float epsilon = {0.25}", "float[1,1,1] epsilon = {0.25}"),
                (
                    "=> (float[S,8] y, float[S,8] next)",
                    "=> (float[R,S,8] y, float[R,S,8] next)",
                ),
            ],
            "'epsilon' is not one",
        ),
    ],
    ids=["difference", "bias", "broadcast", "axis", "read", "epsilon", "wide epsilon"],
)
def test_refusals(changes, reason):
    result = UseSkipRmsNorm().apply(graph_of(*changes))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_a_type_that_the_operator_does_not_take():
    double = ("float[", "double["), ("float epsilon", "double epsilon")
    (refusal,) = (
        UseSkipRmsNorm().apply(graph_of(*double, values=weights().astype("d"))).refusals
    )
    assert refusal.reason == "'h' is float64"


def test_rows_of_unknown_number_may_broadcast():
    reshaped = ("h = Add(a, b)", "c = Reshape(a, k)\n  d = Reshape(b, k)\n  h = Add(c, d)")
    given = ("float[S,8] b)", "float[R,8] b, int64[2] k)")
    opened = ("=> (float[S,8] y, float[S,8] next)", "=> (float[M,8] y, float[M,8] next)")
    graph = graph_of(reshaped, given, opened)
    for name in "cdh":
        graph.tensors()[name].shape = [None, 8]
    (refusal,) = UseSkipRmsNorm().run(graph).refusals
    assert refusal.reason == "an axis of 'h' is not known, so Add 'h' may broadcast"


def test_another_op_between_is_no_match():
    graph = graph_of(("Reciprocal(deviation)", "Exp(deviation)"))
    assert UseSkipRmsNorm().apply(graph).matched == 0


@settings(deadline=None, max_examples=25)
@given(
    width=st.integers(1, 40),
    rows=st.integers(1, 6),
    batched=st.booleans(),
    folded=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_size(width, rows, batched, folded, seed):
    text = BEFORE.replace("S,8", "B,S,8" if batched else "S,8").replace("8]", f"{width}]")
    values = np.random.default_rng(seed).standard_normal(width, dtype=np.float32)
    graph = graph_of(*(FOLDED if folded else []), text=text, values=values)
    assert check_pass(UseSkipRmsNorm(), graph, {"S": rows, "B": 2}).rewritten == 1


def test_nano():
    layers = nano_config().text.num_hidden_layers
    graph = nano_graph("decoder")
    result = check_pass(UseSkipRmsNorm(), graph, {"S": 5, "T": 4, "I": 4}, input_ids=300)
    assert (result.matched, result.rewritten) == (2 * layers + 1, 2 * layers)
    (first,) = result.refusals
    assert first.reason == "'where' is no sum"
