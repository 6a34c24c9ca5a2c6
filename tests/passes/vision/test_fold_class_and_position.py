"""Class and position embeddings in one constant."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.editing import consumers
from mvlm_export.passes.vision.fold_class_and_position import FoldClassAndPosition
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    run_graph,
    tiny_graph,
)

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,6,4] x) => (float[B,7,4] y) <float[4] cls, float[7,4] pos, int64[2] ones> {
  b = Shape<start=0, end=1>(x)
  s = Concat<axis=0>(b, ones)
  e = Expand(cls, s)
  c = Concat<axis=1>(e, x)
  y = Add(c, pos)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,6,4] x) => (float[B,7,4] y) <float[7,4] pos, int64[6] pads> {
  p = Pad<mode="constant">(x, pads)
  y = Add(p, pos)
}
"""
PADS = np.array([0, 1, 0, 0, 0, 0], np.int64)


def weights(patches=6, width=4, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "cls": generator.standard_normal(width, dtype=np.float32),
        "pos": generator.standard_normal((patches + 1, width), dtype=np.float32),
        "ones": np.array([1, width], np.int64),
    }


def expand_to_one():
    """In CLIP the class embedding [C] is expanded to [B, 1, C] by a shape of (B, 1, 1)."""
    return weights() | {"ones": np.array([1, 1], np.int64)}


@pytest.mark.parametrize("given_weights", [weights(), expand_to_one()], ids=["1-C", "1-1"])
def test_before_and_expected(given_weights):
    graph = parse_graph(BEFORE, **given_weights)
    result = check_pass(FoldClassAndPosition(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    expected = parse_graph(EXPECTED, pos=given_weights["pos"], pads=PADS)
    assert_same_structure(graph, expected)


def test_the_positions_may_be_the_first_operand_and_have_a_batch_axis():
    text = BEFORE.replace("Add(c, pos)", "Add(pos, c)").replace(
        "float[7,4] pos", "float[1,7,4] pos"
    )
    given_weights = weights()
    given_weights["pos"] = given_weights["pos"][None]
    assert (
        check_pass(FoldClassAndPosition(), parse_graph(text, **given_weights)).rewritten == 1
    )


def test_values_and_bits():
    given_weights = weights()
    graph = parse_graph(BEFORE, **given_weights)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 6, 4)).astype(np.float32)}
    before = run_graph(graph, feeds)["y"]
    FoldClassAndPosition().apply(graph)
    np.testing.assert_array_equal(run_graph(graph, feeds)["y"], before)
    folded = constants(graph)["pos.with_class"]
    np.testing.assert_array_equal(folded[0], given_weights["cls"] + given_weights["pos"][0])
    np.testing.assert_array_equal(folded[1:], given_weights["pos"][1:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("y = Add", "z = Relu(pos)\n  y = Add"), "'pos' is shared with Relu"),
        (("y = Add", "z = Relu(cls)\n  y = Add"), "'cls' is shared with Relu"),
        (("y = Add", "z = Relu(c)\n  y = Add"), "'c' inside it is also read by Relu"),
        (("y = Add", "z = Relu(e)\n  y = Add"), "'e' inside it is also read by Relu"),
        (("x) =>", "x, float[7,4] pos) =>"), "'pos' is an input of the graph"),
        (("x) =>", "x, float[4] cls) =>"), "'cls' is an input of the graph"),
        (("pos)\n", "q)\n  q = Neg(pos)\n"), "'q' is computed by Neg"),
    ],
    ids=["shared-pos", "shared-class", "cat", "row", "input-pos", "input-class", "computed"],
)
def test_refusals(change, reason):
    text, given_weights = BEFORE.replace(*change), weights()
    if "z =" in text:
        text = text.replace("float[B,7,4] y)", f"float[B,7,4] y, float{_shape(text)} z)")
    if "q = Neg" in text:
        text = text.replace("  q = Neg(pos)\n", "").replace("  b =", "  q = Neg(pos)\n  b =")
    for name, declared in (("pos", "float[7,4] pos, "), ("cls", "float[4] cls, ")):
        if f"'{name}' is an input" in reason:
            head, tail = text.split("<float[4] cls", 1)
            text = head + ("<float[4] cls" + tail).replace(declared, "", 1)
            given_weights.pop(name)
    result = FoldClassAndPosition().apply(parse_graph(text, **given_weights))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def _shape(text):
    read = text.split("Relu(")[1].split(")")[0]
    return {"pos": "[7,4]", "cls": "[4]", "c": "[B,7,4]", "e": "[B,1,4]"}[read]


def test_several_class_rows_are_refused():
    given_weights = weights(7) | {"ones": np.array([2, 4], np.int64)}
    text = BEFORE.replace("7,4]", "8,4]")
    result = FoldClassAndPosition().apply(parse_graph(text, **given_weights))
    assert "not one row before" in result.refusals[0].reason


def test_another_axis_is_refused():
    text = BEFORE.replace("[B,6,4] x", "[B,1,6] x").replace("[B,7,4]", "[B,1,7]")
    text = text.replace("Concat<axis=1>", "Concat<axis=2>").replace("[7,4] pos", "[7] pos")
    given_weights = weights() | {"pos": np.ones(7, np.float32), "cls": np.ones(1, np.float32)}
    text = text.replace("float[4] cls", "float[1] cls")
    given_weights["ones"] = np.array([1, 1], np.int64)
    result = FoldClassAndPosition().apply(parse_graph(text, **given_weights))
    assert "not rows joined along axis 1" in result.refusals[0].reason


def test_one_position_for_all_rows_is_refused():
    text = BEFORE.replace("[7,4] pos", "[1,4] pos")
    given_weights = weights() | {"pos": np.ones((1, 4), np.float32)}
    result = FoldClassAndPosition().apply(parse_graph(text, **given_weights))
    assert "'pos' are [1, 4], not 7 rows" in result.refusals[0].reason


def test_positions_that_add_an_axis_are_refused():
    text = BEFORE.replace("[7,4] pos", "[1,1,7,4] pos").replace("[B,7,4] y", "[1,B,7,4] y")
    given_weights = weights()
    given_weights["pos"] = given_weights["pos"][None, None]
    result = FoldClassAndPosition().apply(parse_graph(text, **given_weights))
    assert "'pos' are [1, 1, 7, 4], not 7 rows" in result.refusals[0].reason


def test_what_is_replaced_reads_nothing():
    graph = parse_graph(BEFORE, **weights())
    FoldClassAndPosition().run(graph)
    assert [node.op for node in consumers(graph.inputs[0])] == ["Shape", "Pad"]


def test_another_op_between_or_the_class_behind_is_no_match():
    between = BEFORE.replace("y = Add(c, pos)", "r = Relu(c)\n  y = Add(r, pos)")
    behind = BEFORE.replace("(e, x)", "(x, e)")
    for text in (between, behind):
        assert FoldClassAndPosition().apply(parse_graph(text, **weights())).matched == 0


@given(
    patches=st.integers(1, 9),
    width=st.integers(1, 6),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(patches, width, batch, seed):
    sizes = {"6": patches, "7": patches + 1, "4": width}
    text = re.sub(r"(?<=[\[,])[467](?=[,\]])", lambda found: str(sizes[found[0]]), BEFORE)
    graph = parse_graph(text, **weights(patches, width, seed))
    assert check_pass(FoldClassAndPosition(), graph, {"B": batch}, rtol=0).rewritten == 1


@pytest.mark.parametrize("keep", ["patch", "cls_patch"])
def test_the_captured_encoder(keep):
    graph = tiny_graph(
        "vision_encoder", mm_vision_select_feature=keep, mm_projector_type="linear"
    )
    assert check_pass(FoldClassAndPosition(), graph, rtol=0).rewritten == 1
    assert not {"Expand", "Shape", "Concat"} & {node.op for node in graph.nodes}


def test_nano():
    graph = nano_graph("vision_encoder")
    before = constants(graph)
    assert check_pass(FoldClassAndPosition(), graph, rtol=0).rewritten == 1
    name = "embeddings.position_embedding.weight"
    assert is_deferred(graph.tensors()[f"{name}.with_class"])
    expected = before[name].copy()
    expected[0] += before["embeddings.class_embedding"]
    np.testing.assert_array_equal(constants(graph)[f"{name}.with_class"], expected)
