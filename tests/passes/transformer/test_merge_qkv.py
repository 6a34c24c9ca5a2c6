"""Query, key and value projections as one MatMul."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import DeferredValues, is_deferred
from mvlm_export.passes.graph_io import bind_weight
from mvlm_export.passes.transformer.merge_qkv import MergeQkv
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    tiny_graph,
)

# v stands first, so that the order is seen to come from attention; one head, past keys.
BEFORE = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[S,8] x, float[T,4] past) => (float[S,4] y, float[S,4] v)
<float[8,4] wq, float[8,4] wk, float[8,4] wv> {
  v = MatMul(x, wv)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  keys = Concat<axis=0>(past, k)
  values = Concat<axis=0>(past, v)
  kt = Transpose<perm=[1,0]>(keys)
  s = MatMul(q, kt)
  p = Softmax<axis=-1>(s)
  y = MatMul(p, values)
}
"""
LAYERS = BEFORE[BEFORE.index("  v =") : BEFORE.index("  keys")]
EXPECTED = BEFORE.replace(LAYERS, "  m = MatMul(x, w)\n  q, k, v = Split<axis=-1>(m, sizes)\n")
EXPECTED = EXPECTED.replace("float[8,4] wq, float[8,4] wk, float[8,4] wv", "float[8,12] w")
BIASED = (
    BEFORE.replace("float[8,4] wv", "float[8,4] wv, float[4] bq, float[4] bk, float[4] bv")
    .replace("v = MatMul(x, wv)", "mv = MatMul(x, wv)\n  v = Add(mv, bv)")
    .replace("q = MatMul(x, wq)", "mq = MatMul(x, wq)\n  q = Add(bq, mq)")
    .replace("k = MatMul(x, wk)", "mk = MatMul(x, wk)\n  k = Add(mk, bk)")
)


def weights(seed=0, hidden=8, size=4, biases=False):
    generator = np.random.default_rng(seed)
    shapes = {f"w{part}": (hidden, size) for part in "qkv"}
    shapes |= {f"b{part}": (size,) for part in "qkv"} if biases else {}
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(MergeQkv(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    merged = {"w": np.zeros((8, 12), np.float32), "sizes": np.array([4, 4, 4])}
    assert_same_structure(graph, parse_graph(EXPECTED, **merged))
    parts = [weights()[name] for name in ("wq", "wk", "wv")]
    np.testing.assert_array_equal(constants(graph)["wq.with_kv"], np.hstack(parts))


def test_biases_are_joined_too():
    given_weights = weights(biases=True)
    graph = parse_graph(BIASED, **given_weights)
    assert check_pass(MergeQkv(), graph).rewritten == 1
    assert [node.op for node in graph.nodes][:3] == ["MatMul", "Add", "Split"]
    found, parts = constants(graph), [given_weights[name] for name in ("bq", "bk", "bv")]
    np.testing.assert_array_equal(found["bq.with_kv"], np.concatenate(parts))


QUANTIZED = re.sub(
    r"(. = MatMul\(x, w(.)\))",
    r"w\2 = DequantizeLinear<ATTRS>(i\2, s\2ZERO)\n  \1",
    BEFORE.replace("<float[8,4] wq, float[8,4] wk, float[8,4] wv>", ""),
)


def quantized(kind, zero_points=True):
    """A graph's text and its constants: ``kind`` is ``rows`` (blocks of 4) or ``columns``."""
    generator = np.random.default_rng(0)
    rows = kind == "rows"
    dtype, high = (ml_dtypes.int4, 8) if rows else (np.int8, 128)
    text = QUANTIZED.replace("ATTRS", "axis=0, block_size=4" if rows else "axis=-1")
    values = {}
    for part in "vqk":  # as they stand in the text
        text = text.replace("ZERO", f", z{part}" if zero_points else "", 1)
        shape = (2, 4) if rows else (4,)
        values[f"i{part}"] = generator.integers(-high, high, (8, 4)).astype(dtype)
        values[f"s{part}"] = generator.random(shape, dtype=np.float32) + 0.5
        if zero_points:
            values[f"z{part}"] = generator.integers(-2, 3, shape).astype(dtype)
    return text, values


def parse_quantized(text, values):
    """Weights are inputs of the text and bound afterwards, as an export binds them."""
    declared = "".join(
        f", {'float' if array.dtype == np.float32 else array.dtype}"
        f"{list(array.shape) or ''} {name}"
        for name, array in values.items()
    )
    graph = parse_graph(text.replace("past)", f"past{declared})", 1))
    for name, array in values.items():
        deferred = DeferredValues(array.shape, array.dtype, lambda array=array: array)
        bind_weight(graph, name, deferred)
    return graph


@pytest.mark.parametrize("zero_points", [True, False], ids=["zero-points", "symmetric"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_quantized_weights(kind, zero_points):
    text, values = quantized(kind, zero_points=zero_points)
    graph = parse_quantized(text, values)
    result = check_pass(MergeQkv(), graph)
    assert (result.rewritten, [node.op for node in graph.nodes].count("MatMul")) == (1, 3)
    found = constants(graph)
    for letter in "isz" if zero_points else "is":
        joined = np.concatenate([values[letter + part] for part in "qkv"], axis=-1)
        np.testing.assert_array_equal(found[f"{letter}q.with_kv"], joined)
    assert found["iq.with_kv"].dtype == values["iq"].dtype


def test_int4_graphs_are_refused_when_they_differ():
    text, values = quantized("rows")
    other = text.replace("block_size=4>(ik", "block_size=2>(ik")
    wider = values | {
        "sk": np.ones((4, 4), np.float32),
        "zk": np.zeros((4, 4), ml_dtypes.int4),
    }
    refuse(parse_quantized(other, wider), "have other axes, blocks or types")
    refuse(parse_quantized(text.replace("sk, zk", "sk"), values), "only one has zero points")
    once = values | {"sk": values["sq"]}
    refuse(parse_quantized(text.replace("sk, zk", "sq, zk"), once), "'sq' is shared with")
    floats = values | {"wk2": np.ones((8, 4), np.float32)}
    mixed = text.replace("MatMul(x, wk)", "MatMul(x, wk2)")
    refuse(parse_quantized(mixed, floats), "only one is quantized")


def test_one_scale_for_the_whole_weight_is_refused():
    text, values = quantized("columns", zero_points=False)
    scalar = values | {f"s{part}": np.float32(1).reshape(()) for part in "qkv"}
    graph = parse_quantized(text, scalar)
    refuse(graph, "do not go by column")


def with_output(text, line, kind):
    text = text.replace("  y = MatMul", f"  u = {line}\n  y = MatMul")
    return text.replace("float[S,4] v)", f"float[S,4] v, {kind} u)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (with_output(BEFORE, "Neg(wk)", "float[8,4]"), "'wk' is shared with Neg"),
        (BEFORE.replace("x, wv", "x, wk"), "'wk' is shared with MatMul"),
        (
            BIASED.replace("Add(mv, bv)", "Identity(mv)"),
            "'mv' has no constant bias of its own",
        ),
        (BIASED.replace("Add(mv, bv)", "Add(mv, mv)"), "has no constant bias of its own"),
        (with_output(BIASED, "Neg(mk)", "float[S,4]"), "has no constant bias of its own"),
    ],
    ids=["shared", "one-for-two", "without-bias", "not-a-bias", "read-before-bias"],
)
def test_refusals(text, reason):
    refuse(parse_used(text, weights(biases=True)), reason)


def test_a_weight_that_is_a_graph_input_is_refused():
    text = BEFORE.replace(", float[8,4] wk", "")
    text = text.replace("float[S,8] x", "float[S,8] x, float[8,4] wk")
    given_weights = weights()
    del given_weights["wk"]
    refuse(parse_graph(text, **given_weights), "'wk' is an input of the graph")


def test_cross_attention_is_refused():
    text = BEFORE.replace("k = MatMul(x, wk)", "n = Neg(x)\n  k = MatMul(n, wk)")
    refuse(parse_graph(text, **weights()), "reads 'n', not 'x'")


def test_keys_of_two_attentions_are_merged_once():
    second = "q2 = MatMul(x, w2)\n  s2 = MatMul(q2, kt)\n  p2 = Softmax<axis=-1>(s2)\n"
    text = BEFORE.replace("  y = MatMul", f"  {second}  u = MatMul(p2, values)\n  y = MatMul")
    text = text.replace("float[S,4] v)", "float[S,4] v, float[S,4] u)")
    text = text.replace("float[8,4] wv", "float[8,4] wv, float[8,4] w2")
    graph = parse_graph(text, **weights(), w2=weights(1)["wq"])
    result = check_pass(MergeQkv(), graph)
    assert (result.matched, result.rewritten) == (2, 1)
    assert result.refusals[0].reason == "'k' belongs to another merged layer"


def parse_used(text, given_weights):
    """A graph with those of the weights that its nodes read."""
    body = text[text.index("{\n") :]
    used = {
        name: value for name, value in given_weights.items() if re.search(rf"\b{name}\b", body)
    }
    for name in ("wq", "wk", "wv", "bq", "bk", "bv"):
        if name not in used:
            text = re.sub(rf", float\[[0-9,]*\] {name}\b", "", text)
    return parse_graph(text, **used)


def refuse(graph, reason):
    result = MergeQkv().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


@pytest.mark.parametrize(
    "change",
    [
        ("k = MatMul(x, wk)", "k = Identity(q)"),
        ("p = Softmax<axis=-1>(s)", "p = Relu(s)"),
        ("v = MatMul(x, wv)", "l = MatMul(x, wv)\n  r = MatMul(x, wk)\n  v = Add(l, r)"),
    ],
    ids=["keys-are-queries", "no-softmax", "values-of-two"],
)
def test_other_graphs_are_no_match(change):
    assert MergeQkv().apply(parse_used(BEFORE.replace(*change), weights())).matched == 0


@given(
    hidden=st.integers(1, 9),
    heads=st.integers(1, 4),
    size=st.integers(1, 5),
    length=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_size_with_one_key_head(hidden, heads, size, length, seed):
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[S,{hidden}] x) => (float[{heads},S,{size}] y)
    <float[{hidden},{heads * size}] wq, float[{hidden},{size}] wk, float[{hidden},{size}] wv,
     int64[3] split_heads = {{-1, {heads}, {size}}}> {{
      k = MatMul(x, wk)
      q = MatMul(x, wq)
      v = MatMul(x, wv)
      qh = Reshape(q, split_heads)
      qt = Transpose<perm=[1,0,2]>(qh)
      kt = Transpose<perm=[1,0]>(k)
      s = MatMul(qt, kt)
      p = Softmax<axis=-1>(s)
      y = MatMul(p, v)
    }}
    """
    values = weights(seed, hidden, size)
    values["wq"] = np.repeat(values["wq"], heads, axis=1)
    graph = parse_graph(text, **values)
    assert check_pass(MergeQkv(), graph, {"S": length}).rewritten == 1
    sizes = next(node for node in graph.nodes if node.op == "Split").inputs[1].values
    assert sizes.tolist() == [heads * size, size, size]


def test_the_captured_encoder():
    graph = tiny_graph("vision_encoder")
    assert check_pass(MergeQkv(), graph).rewritten == 2
    splits = [node for node in graph.nodes if node.op == "Split"]
    assert splits[0].inputs[1] is splits[1].inputs[1]


@pytest.mark.parametrize("heads", [4, 2])
def test_the_captured_decoder(heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    outputs = [tensor.name for tensor in graph.outputs]
    sizes = {"S": 3, "T": 4, "I": 5}
    result = check_pass(MergeQkv(), graph, sizes, input_ids=320)
    assert (result.matched, result.rewritten) == (2, 2)
    assert [tensor.name for tensor in graph.outputs] == outputs


@pytest.mark.parametrize("name", ["vision_encoder", "decoder"])
def test_nano(name):
    graph, stem = nano_graph(name), "encoder" if name == "vision_encoder" else "model"
    source = constants(graph)
    sizes = {"S": 3, "T": 4, "I": 5}
    assert check_pass(MergeQkv(), graph, sizes, input_ids=512).rewritten == 4
    keys = [f"{stem}.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    merged = graph.tensors()[f"{keys[0]}.with_kv"]
    assert is_deferred(merged)
    joined = np.hstack([source[key] for key in keys])
    np.testing.assert_array_equal(constants(graph)[merged.name], joined)
