"""The average pool before the second pointwise convolution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.general.clean_layout import CleanLayout
from mvlm_export.passes.projector.fold_peg_skip import FoldPegSkip
from mvlm_export.passes.projector.move_pool_before_pointwise import MovePoolBeforePointwise
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
g (float[B,24,3] x) => (float[B,5,2,3] y)
  <float[3,5] w, float[5] b, int64[4] s = {-1, 5, 4, 6}> {
  m = MatMul(x, w)
  a = Add(m, b)
  t = Transpose<perm=[0,2,1]>(a)
  v = Reshape<allowzero=1>(t, s)
  y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(v)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,24,3] x) => (float[B,5,2,3] y)
  <float[3,5] w, float[5] b, int64[4] s = {-1, 3, 4, 6}, int64[3] f = {-1, 3, 6},
   int64[4] r = {-1, 5, 2, 3}> {
  t = Transpose<perm=[0,2,1]>(x)
  v = Reshape<allowzero=1>(t, s)
  p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(v)
  q = Reshape<allowzero=1>(p, f)
  u = Transpose<perm=[0,2,1]>(q)
  m = MatMul(u, w)
  a = Add(m, b)
  z = Transpose<perm=[0,2,1]>(a)
  y = Reshape<allowzero=1>(z, r)
}
"""
KINDS = {
    "ldpnetv2": 1,
    "ldpnetv2_nopool": 0,
    "pw2_pool": 1,
    "pw2_pool_pos": 1,
    "ldpnet": 0,
    "mlp2x_gelu": 0,
}


def weights(inner=3, outer=5, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "w": generator.standard_normal((inner, outer), dtype=np.float32),
        "b": generator.standard_normal(outer, dtype=np.float32),
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(MovePoolBeforePointwise(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_weights_are_the_same_and_the_batch_stays_dynamic():
    graph = parse_graph(BEFORE, **weights())
    MovePoolBeforePointwise().apply(graph)
    found = constants(graph)
    np.testing.assert_array_equal(found["w"], weights()["w"])
    np.testing.assert_array_equal(found["b"], weights()["b"])
    assert {tensor.shape[0] for node in graph.nodes for tensor in node.outputs} == {"B"}


def test_a_given_batch_stays():
    text = BEFORE.replace("[B,", "[2,").replace("{-1, 5, 4, 6}", "{2, 5, 4, 6}")
    assert check_pass(MovePoolBeforePointwise(), parse_graph(text, **weights())).rewritten == 1


def test_the_bias_may_come_first_or_be_missing():
    for text in (
        BEFORE.replace("Add(m, b)", "Add(b, m)"),
        BEFORE.replace("a = Add(m, b)", "").replace("(a)", "(m)").replace(", float[5] b", ""),
    ):
        used = weights()
        if "float[5]" not in text:
            used.pop("b")
        assert check_pass(MovePoolBeforePointwise(), parse_graph(text, **used)).rewritten == 1


def test_a_computed_or_shared_weight_may_stay():
    text = BEFORE.replace("m = MatMul(x, w)", "n = Neg(w)\n  m = MatMul(x, n)\n  o = Exp(w)")
    text = text.replace("(float[B,5,2,3] y)", "(float[B,5,2,3] y, float[3,5] o)")
    assert check_pass(MovePoolBeforePointwise(), parse_graph(text, **weights())).rewritten == 1


def test_rows_beyond_a_multiple_of_the_window_are_dropped_in_either_order():
    text = BEFORE.replace("[B,24,3]", "[B,35,3]").replace("{-1, 5, 4, 6}", "{-1, 5, 5, 7}")
    assert check_pass(MovePoolBeforePointwise(), parse_graph(text, **weights())).rewritten == 1


def test_two_linears_are_both_passed():
    square = np.eye(5, dtype=np.float32) * 2
    text = BEFORE.replace("a = Add(m, b)", "k = Add(m, b)\n  a = MatMul(k, w2)")
    text = text.replace("float[5] b", "float[5] b, float[5,5] w2")
    graph = parse_graph(text, w2=square, **weights())
    assert check_pass(MovePoolBeforePointwise(), graph).rewritten == 2
    operators = [node.op for node in graph.nodes]
    assert operators.index("AveragePool") < operators.index("MatMul")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("strides=[2,2]", "strides=[1,1]"), ("5,2,3]", "5,3,5]")], "strides are [1, 1]"),
        ([("strides=[2,2]", "strides=[2,2], pads=[1,1,1,1]"), ("5,2,3]", "5,3,4]")], "padded"),
        ([("strides=[2,2]", "strides=[2,2], ceil_mode=1")], "ceil_mode"),
        ([("strides=[2,2]", 'strides=[2,2], auto_pad="SAME_UPPER"')], "SAME_UPPER"),
        ([("strides=[2,2]", "strides=[2,2], dilations=[2,1]"), ("2,3]", "1,3]")], "dilations"),
        ([("Add(m, b)", "Add(m, c)"), ("float[5] b", "float[24,5] c")], "not the same for"),
        ([("[0,2,1]", "[2,0,1]"), ("[B,", "[5,"), ("{-1", "{5")], "transposed by [2, 0, 1]"),
        (
            [("}> {", "}> {\n  e = Identity(s)"), ("(t, s)", "(t, e)")],
            "sizes 'e' are computed",
        ),
        ([("{-1, 5, 4, 6}", "{-1, 10, 2, 6}"), ("5,2,3]", "10,1,3]")], "do not become a grid"),
    ],
    ids=["overlap", "pads", "ceil", "auto-pad", "dilations", "bias", "perm", "sizes", "grid"],
)
def test_refusals(changes, reason):
    text = BEFORE
    for change in changes:
        assert change[0] in text
        text = text.replace(*change)
    used = weights()
    if "float[24,5] c" in text:
        used = {"w": used["w"], "c": np.ones((24, 5), np.float32)}
    result = MovePoolBeforePointwise().apply(parse_graph(text, **used))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_a_bias_that_widens_is_refused():
    used = {"w": weights(outer=1)["w"], "b": weights()["b"]}
    graph = parse_graph(BEFORE.replace("[3,5] w", "[3,1] w"), **used)
    result = MovePoolBeforePointwise().apply(graph)
    assert "the bias 'b' widens 1 channels to (5,)" in result.refusals[0].reason


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 5)])
def test_a_bias_may_have_any_shape_that_does_not(shape):
    text = BEFORE.replace("float[5] b", f"float{list(shape) or ''} b")
    graph = parse_graph(text, w=weights()["w"], b=np.full(shape, 2, np.float32))
    assert check_pass(MovePoolBeforePointwise(), graph).rewritten == 1


@pytest.mark.parametrize("inner", ["m", "a", "t", "v"])
def test_an_inner_tensor_read_elsewhere(inner):
    shape = {"m": "B,24,5", "a": "B,24,5", "t": "B,5,24", "v": "B,5,4,6"}[inner]
    text = BEFORE.replace("3] y)", f"3] y, float[{shape}] z)")
    graph = parse_graph(text.replace("\n}", f"\n  z = Relu({inner})\n}}"), **weights())
    result = MovePoolBeforePointwise().apply(graph)
    assert f"'{inner}' inside it is also read by Relu" in result.refusals[0].reason


def test_an_activation_between_is_no_match():
    text = BEFORE.replace("a = Add(m, b)", "l = Add(m, b)\n  a = Gelu(l)")
    assert MovePoolBeforePointwise().apply(parse_graph(text, **weights())).matched == 0


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    rest=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_grid(sizes, rest, channels, batch, seed):
    """Any kernel, square or not, on any grid, a multiple of it or not."""
    rows, columns, tall, wide = sizes
    height, width = rows * tall + rest[0] % tall, columns * wide + rest[1] % wide
    inner, outer = channels
    text = (
        BEFORE.replace("[B,24,3]", f"[B,{height * width},{inner}]")
        .replace("[B,5,2,3]", f"[B,{outer},{rows},{columns}]")
        .replace("float[3,5] w, float[5] b", f"float[{inner},{outer}] w, float[{outer}] b")
        .replace("{-1, 5, 4, 6}", f"{{-1, {outer}, {height}, {width}}}")
        .replace("[2,2]", f"[{tall},{wide}]")
    )
    graph = parse_graph(text, **weights(inner, outer, seed))
    assert check_pass(MovePoolBeforePointwise(), graph, {"B": batch}).rewritten == 1


@pytest.mark.parametrize(("kind", "count"), KINDS.items())
def test_the_captured_projectors(kind, count):
    graph = tiny_graph("projector", mm_projector_type=kind)
    result = check_pass(MovePoolBeforePointwise(), graph)
    assert (result.matched, result.rewritten) == (count, count)


def test_tokens_are_not_turned_back_and_forth_once_cleaned():
    graph = tiny_graph("projector", mm_projector_type="pw2_pool")
    MovePoolBeforePointwise().apply(graph)
    CleanLayout().apply(graph)
    assert [node.op for node in graph.nodes][-3:] == ["Transpose", "MatMul", "Add"]


def test_another_grid():
    graph = tiny_graph("projector", vision_config={"image_size": 14 * 6})
    assert check_pass(MovePoolBeforePointwise(), graph).rewritten == 1


def test_nano_and_the_skip_behind_it():
    graph = nano_graph("projector")
    assert check_pass(MovePoolBeforePointwise(), graph).rewritten == 1
    second = [node for node in graph.nodes if node.op == "MatMul"][1]
    assert second.inputs[0].shape == ["B", 16, 256]
    assert check_pass(FoldPegSkip(), graph).rewritten == 1
