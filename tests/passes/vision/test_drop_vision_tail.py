"""The class row is dropped before the last MLP."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.general.remove_dead_code import RemoveDeadCode
from mvlm_export.passes.vision.drop_vision_tail import DropVisionTail
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
g (float[B,5,4] h) => (float[B,4,4] y)
  <float[4,4] o, float[4] ob, float[4] g, float[4] gb, float[4,6] u, float[6,4] d,
   int64[1] one = {1}, int64[1] end = {9223372036854775807}> {
  t = Transpose<perm=[0,2,1]>(h)
  m = MatMul(h, t)
  a = MatMul(m, h)
  p = MatMul(a, o)
  pb = Add(p, ob)
  r = Add(h, pb)
  n = LayerNormalization<axis=-1>(r, g, gb)
  f = MatMul(n, u)
  s = Sigmoid(f)
  w = Mul(f, s)
  k = MatMul(w, d)
  z = Add(r, k)
  y = Slice(z, one, end, one, one)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,5,4] h) => (float[B,4,4] y)
  <float[4,4] o, float[4] ob, float[4] g, float[4] gb, float[4,6] u, float[6,4] d,
   int64[1] one = {1}, int64[1] end = {9223372036854775807}> {
  t = Transpose<perm=[0,2,1]>(h)
  m = MatMul(h, t)
  a0 = MatMul(m, h)
  a = Slice(a0, one, end, one, one)
  h1 = Slice(h, one, end, one, one)
  p = MatMul(a, o)
  pb = Add(p, ob)
  r = Add(h1, pb)
  n = LayerNormalization<axis=-1>(r, g, gb)
  f = MatMul(n, u)
  s = Sigmoid(f)
  w = Mul(f, s)
  k = MatMul(w, d)
  y = Add(r, k)
}
"""
DEAD_TAIL = """
  q = LayerNormalization<axis=-1>(z, g, gb)
  first = Slice(q, zero, one, one, one)
  q1 = MatMul(q, o)
  q2 = Add(q, q1)
  pooled = ReduceMean(q2)
}
"""


def weights(rows=5, width=4, inner=6, seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"o": (width, width), "ob": (width,), "g": (width,), "gb": (width,)}
    shapes |= {"u": (width, inner), "d": (inner, width)}
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def with_dead_tail(text):
    tail = DEAD_TAIL.replace("zero", "zero0")
    declared = text.replace("int64[1] one = {1}", "int64[1] zero0 = {0}, int64[1] one = {1}")
    return declared.rstrip().removesuffix("}") + tail.lstrip("\n")


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(DropVisionTail(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_every_tensor_behind_the_attention_has_one_row_less():
    graph = parse_graph(BEFORE, **weights())
    DropVisionTail().apply(graph)
    rows = {name: t.shape[1] for name, t in graph.tensors().items() if name in "aprnfswky"}
    assert rows == {"a": 5} | dict.fromkeys("prnfswky", 4)


def test_a_dead_tail_is_left_to_remove_dead_code():
    graph = parse_graph(with_dead_tail(BEFORE), **weights())
    result = DropVisionTail().apply(graph)
    assert (result.matched, result.rewritten, len(graph.nodes)) == (1, 0, 18)
    assert "'z' is also read by LayerNormalization" in result.refusals[0].reason
    assert RemoveDeadCode().apply(graph).rewritten == 5
    assert check_pass(DropVisionTail(), graph).rewritten == 1
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_a_kept_class_row_is_no_match_whatever_is_dead():
    kept = BEFORE.replace("  y = Slice(z, one, end, one, one)\n", "").replace("z =", "y =")
    kept = kept.replace("[B,4,4] y", "[B,5,4] y")
    dead = with_dead_tail(kept).replace("(z, g, gb)", "(y, g, gb)")
    for text in (kept, dead):
        assert DropVisionTail().apply(parse_graph(text, **weights())).matched == 0


def test_one_slice_behind_two_outputs_is_moved_once():
    text = BEFORE.replace("float[B,4,4] y)", "float[B,4,4] y, float16[B,4,4] x)")
    text = text.rstrip().removesuffix("}") + "  x = Cast<to=10>(y)\n}"
    graph = parse_graph(text, **weights())
    result = check_pass(DropVisionTail(), graph, rtol=2e-3)
    assert (result.matched, result.rewritten) == (1, 1)


ROWS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,N,4] x) => (float[B,5,4] y)
  <int64[1] from = {1}, int64[1] to = {6}, int64[1] axis = {1}> {
  h = Relu(x)
  y = Slice(h, from, to, axis)
}
"""


@pytest.mark.parametrize(
    ("rows", "to", "kept", "reason"),
    [
        ("N", 6, 5, "it ends at row 6, not at the last"),
        ("N", 2**31 - 2, 5, "it ends at row 2147483646, not at the last"),
        (1, 6, 0, "it takes 0 of the 1 rows of 'h'"),
        (9, -1, 7, "it ends at row -1, not at the last"),
    ],
    ids=["dynamic", "large", "one-row", "negative"],
)
def test_refusals_for_the_end(rows, to, kept, reason):
    text = ROWS.replace("B,N", f"B,{rows}").replace("{6}", f"{{{to}}}")
    result = DropVisionTail().apply(parse_graph(text.replace("B,5", f"B,{kept}")))
    assert (result.matched, result.rewritten) == (1, 0)
    assert result.refusals[0].reason == reason


def test_rows_behind_the_last_are_refused():
    text = ROWS.replace("B,N", "B,5").replace("B,5,4] y", "B,0,4] y").replace("{1}, ", "{7}, ")
    result = DropVisionTail().apply(parse_graph(text.replace("{6}", "{9}")))
    assert result.refusals[0].reason == "it takes 0 of the 5 rows of 'h'"


@pytest.mark.parametrize("to", [2**31 - 1, 2**63 - 1])
def test_the_end_of_a_dynamic_number_of_rows(to):
    graph = parse_graph(ROWS.replace("{6}", f"{{{to}}}"))
    assert check_pass(DropVisionTail(), graph, {"N": 6}).rewritten == 1


def test_a_slice_of_another_domain_is_no_match():
    text = ROWS.replace('["" : 20]', '["" : 20, "my" : 1]').replace("= Slice", "= my.Slice")
    assert DropVisionTail().apply(parse_graph(text.replace("B,N", "B,6"))).matched == 0


def test_a_cast_may_stand_behind_the_slice():
    text = BEFORE.replace("y = Slice", "x = Slice").rstrip().removesuffix("}")
    text = text.replace("float[B,4,4] y", "float16[B,4,4] y") + "  y = Cast<to=10>(x)\n}"
    assert (
        check_pass(DropVisionTail(), parse_graph(text, **weights()), rtol=2e-3).rewritten == 1
    )


def test_a_hidden_state_that_is_used_twice_is_sliced_once():
    """The region ends at ``n``, which is read outside; both its readers get one Slice."""
    text = BEFORE.replace("float[B,4,4] y)", "float[B,4,4] y, float[B,5,4] n)")
    text = text.replace("k = MatMul(w, d)", "k0 = MatMul(w, d)\n  k = Add(k0, n)")
    graph = parse_graph(text, **weights())
    assert check_pass(DropVisionTail(), graph).rewritten == 1
    assert [node.op for node in graph.nodes].count("Slice") == 2
    assert graph.tensors()["r"].shape[1] == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("z = Add", "v = Relu(z)\n  z = Add"), "'z' is also read by Relu"),
        (("float[B,4,4] y)", "float[B,4,4] y, float[B,5,4] z)"), "'z' is also an output of"),
        (("z = Add(r, k)", "i = Add(r, k)\n  z = Softmax<axis=1>(i)"), "along the axes [1]"),
        (("z = Add(r, k)", "z = MatMul(m, k)"), "by 'k', which is no constant matrix"),
        (("z = Add(r, k)", "z = Transpose<perm=[0,1,2]>(k)"), "not known to be row-wise"),
        (("z = Add(r, k)", "z = Add(k, per_row)"), "has the constant 'per_row', of several"),
        (("(z, one, end, one, one)", "(z, one, four, one, one)"), "it ends at row 4, not"),
        (("(z, one, end, one, one)", "(z, one, end, one, two)"), "in steps of [2], not rows"),
        (("(z, one, end, one, one)", "(z, one, end, two, one)"), "it cuts the axes [2] in"),
        (("(z, one, end, one, one)", "(z, from, end, one, one)"), "its bounds are computed"),
    ],
    ids=[
        "read-elsewhere", "output", "across-rows", "product", "transpose", "constant-of-rows",
        "end", "step", "axis", "computed-bound",
    ],
)  # fmt: skip
def test_refusals(change, reason):
    more = "int64[1] two = {2}, int64[1] four = {4}, int64[1] one = {1}"
    text = BEFORE.replace(*change).replace("int64[1] one = {1}", more)
    if "Relu" in reason:
        text = text.replace("float[B,4,4] y)", "float[B,4,4] y, float[B,5,4] v)")
        text = text.replace("  v = Relu(z)\n", "").replace("  y = S", "  v = Relu(z)\n  y = S")
    if "steps" in reason or "axes [2]" in reason:
        text = text.replace("float[B,4,4] y", "float[B,K,L] y")
    if "computed" in reason:
        text = text.replace("  t =", "  from = Neg(four)\n  t =")
    if "row 4" in reason:
        text = text.replace("float[B,4,4] y", "float[B,3,4] y")
    more_weights = {"per_row": np.ones((5, 4), np.float32)} if "per_row)" in text else {}
    graph = parse_graph(text, **weights(), **more_weights)
    nodes = len(graph.nodes)
    result = DropVisionTail().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason
    assert len(graph.nodes) == nodes


def test_no_slice_is_no_match():
    text = BEFORE.replace("y = Slice(z, one, end, one, one)", "y = Relu(z)")
    text = text.replace("float[B,4,4] y", "float[B,5,4] y")
    assert DropVisionTail().apply(parse_graph(text, **weights())).matched == 0


@given(
    rows=st.integers(2, 7),
    start=st.integers(0, 6),
    width=st.integers(2, 6),  # of one number ONNX Runtime 1.23 takes no norm
    inner=st.integers(1, 6),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(rows, start, width, inner, batch, seed):
    start = min(start, rows - 1)
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B,{rows},{width}] h) => (float[B,{rows - start},{width}] y)
      <float[{width},{width}] o, float[{width}] ob, float[{width}] g, float[{width}] gb,
       float[{width},{inner}] u, float[{inner},{width}] d, int64[1] start = {{{start}}},
       int64[1] axis = {{1}}, int64[1] end = {{{rows}}}> {{
      {BEFORE.split("{", 3)[3].rsplit("y =", 1)[0]}
      y = Slice(z, start, end, axis)
    }}
    """
    graph = parse_graph(text, **weights(rows, width, inner, seed))
    assert check_pass(DropVisionTail(), graph, {"B": batch}).rewritten == 1


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_the_captured_encoder(act, layer):
    config = {"vision_config": {"hidden_act": act}, "mm_vision_select_layer": layer}
    graph = tiny_graph("vision_encoder", **config)
    assert check_pass(DropVisionTail(), graph).rewritten == 1


def test_the_captured_encoder_that_keeps_its_class_row():
    config = {"mm_vision_select_feature": "cls_patch", "mm_projector_type": "linear"}
    assert DropVisionTail().apply(tiny_graph("vision_encoder", **config)).matched == 0


def test_nano():
    graph = nano_graph("vision_encoder")
    before = constants(graph)
    assert check_pass(DropVisionTail(), graph).rewritten == 1
    after = constants(graph)
    assert all(after[name] is not None for name in before if name.startswith("encoder"))
    weights_read = {t.name: node for node in graph.nodes for t in node.inputs}
    for name in ("self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
        node = weights_read[f"encoder.layers.3.{name}.weight"]
        assert node.inputs[0].shape[1] == 64
        assert weights_read[f"encoder.layers.2.{name}.weight"].inputs[0].shape[1] == 65
    assert weights_read["encoder.layers.3.self_attn.q_proj.weight"].inputs[0].shape[1] == 65
