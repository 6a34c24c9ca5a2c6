"""PEG's skip in the centre tap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.projector.fold_peg_skip import FoldPegSkip
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    tiny_graph,
)

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4,H,W] x) => (float[B,4,H,W] y) <float[4,1,3,3] w, float[4] b> {
  c = Conv<group=4, kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)
  y = Add(c, x)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4,H,W] x) => (float[B,4,H,W] y) <float[4,1,3,3] w, float[4] b> {
  y = Conv<group=4, kernel_shape=[3,3], pads=[1,1,1,1]>(x, w, b)
}
"""


def weights(channels=4, kernel=3, group_width=1, seed=0):
    generator = np.random.default_rng(seed)
    shape = (channels, group_width, kernel, kernel)
    return {
        "w": generator.standard_normal(shape, dtype=np.float32),
        "b": generator.standard_normal(channels, dtype=np.float32),
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(FoldPegSkip(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_the_skip_may_be_the_first_operand():
    graph = parse_graph(BEFORE.replace("Add(c, x)", "Add(x, c)"), **weights())
    assert check_pass(FoldPegSkip(), graph).rewritten == 1


def test_one_is_added_to_the_centre_alone():
    graph = parse_graph(BEFORE, **weights())
    FoldPegSkip().apply(graph)
    folded = constants(graph)["w.with_skip"]
    identity = np.zeros((4, 1, 3, 3), np.float32)
    identity[:, 0, 1, 1] = 1
    np.testing.assert_array_equal(folded, weights()["w"] + identity)


@pytest.mark.parametrize(
    ("change", "values", "reason"),
    [
        (("y = Add(c, x)", "y = Add(c, x)\n  z = Mul(w, w)"), {}, "'w' is shared with Mul"),
        (("(float[B,4,H,W] x)", "(float[B,4,H,W] x, float[4,1,3,3] w)"), {}, "input of the"),
        (("y = Add(c, x)", "y = Add(c, x)\n  z = Relu(c)"), {}, "'c' inside it is also read"),
        (("pads=[1,1,1,1]", "pads=[2,2,0,0]"), {}, "pads [2, 2, 0, 0] do not keep"),
        (("pads=[1,1,1,1]", "pads=[2,2,2,2], dilations=[2,2]"), {}, "dilations are [2, 2]"),
        (("pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"'), {}, "auto_pad is SAME_UPPER"),
        (("group=4", "group=2"), {"group_width": 2}, "2 groups, it is not depthwise"),
    ],
    ids=["shared", "graph-input", "read-elsewhere", "pads", "dilations", "auto-pad", "dense"],
)
def test_refusals(change, values, reason):
    text = BEFORE.replace(*change)
    given_weights = weights(**values)
    if "z =" in text:
        kind = "float[4,1,3,3] z" if "Mul" in text else "float[B,4,H,W] z"
        text = text.replace("(float[B,4,H,W] y)", f"(float[B,4,H,W] y, {kind})")
    if "input" in reason:
        text = text.replace("<float[4,1,3,3] w, float[4] b>", "<float[4] b>")
        given_weights.pop("w")
    if values:
        text = text.replace("float[4,1,3,3] w", "float[4,2,3,3] w")
    graph = parse_graph(text, **given_weights)
    result = FoldPegSkip().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_two_skips_fold_in_one_run():
    text = BEFORE.replace("y = Add(c, x)", "a = Add(x, c)\n  y = Add(a, x)")
    graph = parse_graph(text, **weights())
    result = check_pass(FoldPegSkip(), graph)
    assert (result.matched, result.rewritten) == (2, 2)
    assert_same_structure(graph, parse_graph(EXPECTED, **weights()))


def test_another_op_between_is_no_match():
    text = BEFORE.replace("y = Add(c, x)", "r = Relu(c)\n  y = Add(r, x)")
    assert FoldPegSkip().apply(parse_graph(text, **weights())).matched == 0


@given(
    channels=st.integers(1, 8),
    kernel=st.sampled_from([1, 3, 5]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(channels, kernel, height, width, batch, seed):
    half = kernel // 2
    text = (
        BEFORE.replace("4", str(channels))
        .replace("[3,3]", f"[{kernel},{kernel}]")
        .replace("1,3,3", f"1,{kernel},{kernel}")
        .replace("pads=[1,1,1,1]", f"pads=[{half},{half},{half},{half}]")
    )
    graph = parse_graph(text, **weights(channels, kernel, seed=seed))
    sizes = {"B": batch, "H": height, "W": width}
    assert check_pass(FoldPegSkip(), graph, sizes).rewritten == 1


@pytest.mark.parametrize("kind", ["ldpnetv2", "ldpnetv2_nopool"])
def test_the_captured_projector(kind):
    graph = tiny_graph("projector", mm_projector_type=kind)
    assert check_pass(FoldPegSkip(), graph).rewritten == 1


def test_nano():
    graph = nano_graph("projector")
    source = constants(graph)["peg.peg.0.weight"]
    assert check_pass(FoldPegSkip(), graph).rewritten == 1
    folded = graph.tensors()["peg.peg.0.weight.with_skip"]
    assert is_deferred(folded)
    values = constants(graph)[folded.name]
    assert_close(values[:, 0, 1, 1] - 1, source[:, 0, 1, 1])
    values[:, 0, 1, 1] = source[:, 0, 1, 1]
    np.testing.assert_array_equal(values, source)
