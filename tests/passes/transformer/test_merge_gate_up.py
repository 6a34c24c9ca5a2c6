"""Gate and up projections as one MatMul."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.transformer.merge_gate_up import MergeGateUp
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
g (float[S,4] x) => (float[S,6] y) <float[4,6] wg, float[4,6] wu> {
  u = MatMul(x, wu)
  z = MatMul(x, wg)
  s = Sigmoid(z)
  a = Mul(z, s)
  y = Mul(a, u)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,4] x) => (float[S,6] y) <float[4,12] w, int64[2] sizes = {6, 6}> {
  m = MatMul(x, w)
  z, u = Split<axis=-1>(m, sizes)
  s = Sigmoid(z)
  a = Mul(z, s)
  y = Mul(a, u)
}
"""


def weights(seed=0, width=4, inner=6):
    generator = np.random.default_rng(seed)
    shape = (width, inner)
    return {
        "wg": generator.standard_normal(shape, dtype=np.float32),
        "wu": generator.standard_normal(shape, dtype=np.float32),
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(MergeGateUp(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    merged = np.hstack([weights()["wg"], weights()["wu"]])
    assert_same_structure(graph, parse_graph(EXPECTED, w=merged))
    np.testing.assert_array_equal(constants(graph)["wg.with_up"], merged)


@pytest.mark.parametrize(
    "change",
    [
        ("y = Mul(a, u)", "y = Mul(u, a)"),
        ("a = Mul(z, s)", "a = Mul(s, z)"),
        ("s = Sigmoid(z)\n  a = Mul(z, s)", "a = Gelu(z)"),
        ("s = Sigmoid(z)\n  a = Mul(z, s)", "a = Relu(z)"),
    ],
    ids=["up-first", "sigmoid-first", "gelu", "relu"],
)
def test_other_spellings(change):
    graph = parse_graph(BEFORE.replace(*change), **weights())
    assert check_pass(MergeGateUp(), graph).rewritten == 1
    assert [node.op for node in graph.nodes].count("MatMul") == 1


def test_biases_are_joined_too():
    text = BEFORE.replace("float[4,6] wu>", "float[4,6] wu, float[6] bg, float[1,6] bu>")
    text = text.replace("u = MatMul(x, wu)", "k = MatMul(x, wu)\n  u = Add(k, bu)")
    text = text.replace("z = MatMul(x, wg)", "l = MatMul(x, wg)\n  z = Add(bg, l)")
    biases = {"bg": np.arange(6, dtype=np.float32), "bu": np.ones((1, 6), np.float32)}
    graph = parse_graph(text, **weights(), **biases)
    assert check_pass(MergeGateUp(), graph).rewritten == 1
    assert [node.op for node in graph.nodes[:3]] == ["MatMul", "Add", "Split"]
    np.testing.assert_array_equal(constants(graph)["bg.with_up"], [*range(6), *[1] * 6])


def test_a_third_reader_keeps_its_own():
    text = BEFORE.replace("y = Mul(a, u)", "y = Mul(a, u)\n  o = MatMul(x, v)")
    text = text.replace("(float[S,6] y)", "(float[S,6] y, float[S,4] o)")
    text = text.replace("float[4,6] wu>", "float[4,6] wu, float[4,4] v>")
    graph = parse_graph(text, **weights(), v=np.eye(4, dtype=np.float32))
    assert check_pass(MergeGateUp(), graph).rewritten == 1
    assert "v" in constants(graph)


@pytest.mark.parametrize(
    ("text", "dropped", "reason"),
    [
        (BEFORE.replace("y = Mul(a, u)", "y = Mul(a, u)\n  o = Neg(wg)").replace(
            "(float[S,6] y)", "(float[S,6] y, float[4,6] o)"), (), "'wg' is shared with Neg"),
        (BEFORE.replace("x, wu", "x, wg").replace(", float[4,6] wu", ""), ("wu",),
         "'wg' is shared with MatMul"),
        (BEFORE.replace(", float[4,6] wu", "").replace("[S,4] x", "[S,4] x, float[4,6] wu"),
         ("wu",), "'wu' is an input of the graph"),
        (BEFORE.replace("u = MatMul(x, wu)", "n = Neg(wu)\n  u = MatMul(x, n)"), (),
         "'n' is computed by Neg"),
    ],
    ids=["shared", "one-for-both", "graph-input", "computed"],
)  # fmt: skip
def test_refusals(text, dropped, reason):
    given_weights = {name: v for name, v in weights().items() if name not in dropped}
    result = MergeGateUp().apply(parse_graph(text, **given_weights))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@pytest.mark.parametrize(
    ("end", "taken"),
    [
        ("m = Mul(a, v)", "z"),
        ("r = Relu(u)\n  m = Mul(r, z)", "u"),
        ("r = Gelu(z)\n  m = Mul(r, u)", "z"),
    ],
    ids=["two-ups", "mutual", "two-activations"],
)
def test_a_layer_of_two_pairs_is_merged_once(end, taken):
    text = BEFORE.replace("y = Mul(a, u)", f"k = Mul(a, u)\n  {end}\n  y = Add(k, m)")
    text = text.replace("  u =", "  v = MatMul(x, wv)\n  u =")
    text = text.replace("float[4,6] wu", "float[4,6] wu, float[4,6] wv")
    graph = parse_graph(text, **weights(), wv=weights(1)["wu"])
    result = check_pass(MergeGateUp(), graph)
    assert (result.matched, result.rewritten) == (2, 1)
    assert result.refusals[0].reason == f"{taken!r} belongs to another merged layer"


def test_other_dtypes_are_refused():
    graph = parse_graph(BEFORE, **weights())
    graph.tensors()["wu"].values = weights()["wu"].astype(np.float16)
    result = MergeGateUp().run(graph)
    assert "'wg' is float32, 'wu' is float16" in result.refusals[0].reason


@pytest.mark.parametrize(
    "change",
    [
        ("u = MatMul(x, wu)", "n = Neg(x)\n  u = MatMul(n, wu)"),
        ("y = Mul(a, u)", "n = Neg(u)\n  y = Mul(a, n)"),
        ("y = Mul(a, u)", "y = Add(a, u)"),
        ("a = Mul(z, s)", "a = Mul(u, s)"),
    ],
    ids=["other-source", "op-between", "sum", "crossed"],
)
def test_other_graphs_are_no_match(change):
    assert MergeGateUp().apply(parse_graph(BEFORE.replace(*change), **weights())).matched == 0


@given(
    width=st.integers(1, 9),
    inner=st.integers(1, 9),
    length=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_size(width, inner, length, seed):
    text = re.sub(r"\b[46]\b", lambda found: str({"4": width, "6": inner}[found[0]]), BEFORE)
    graph = parse_graph(text, **weights(seed, width, inner))
    assert check_pass(MergeGateUp(), graph, {"S": length}).rewritten == 1


def test_the_captured_decoder():
    sizes = {"S": 3, "T": 4, "I": 5}
    result = check_pass(MergeGateUp(), tiny_graph("decoder"), sizes, input_ids=320)
    assert (result.matched, result.rewritten) == (2, 2)


def test_the_encoder_has_no_gate():
    assert MergeGateUp().apply(tiny_graph("vision_encoder")).matched == 0


def test_nano():
    graph = nano_graph("decoder")
    source, stem = constants(graph), "model.layers.3.mlp"
    sizes = {"S": 3, "T": 4, "I": 5}
    assert check_pass(MergeGateUp(), graph, sizes, input_ids=512).rewritten == 4
    merged = graph.tensors()[f"{stem}.gate_proj.weight.with_up"]
    assert is_deferred(merged)
    joined = np.hstack([source[f"{stem}.{part}_proj.weight"] for part in ("gate", "up")])
    np.testing.assert_array_equal(constants(graph)[merged.name], joined)
