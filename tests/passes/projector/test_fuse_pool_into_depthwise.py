"""The average pool in the depthwise kernel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.editing import consumers
from mvlm_export.passes.projector.fold_peg_skip import FoldPegSkip
from mvlm_export.passes.projector.fuse_pool_into_depthwise import FusePoolIntoDepthwise
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
g (float[B,4,6,8] x) => (float[B,4,3,4] y) <float[4,1,3,3] w, float[4] b> {
  p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x)
  y = Conv<group=4, kernel_shape=[3,3], pads=[1,1,1,1]>(p, w, b)
}
"""
WITH_SKIP = BEFORE.replace("y = Conv", "c = Conv").replace("\n}", "\n  y = Add(c, p)\n}")
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4,6,8] x) => (float[B,4,3,4] y) <float[4,1,6,6] w, float[4] b> {
  y = Conv<group=4, kernel_shape=[6,6], pads=[2,2,2,2], strides=[2,2]>(x, w, b)
}
"""
COUNTS = {
    "ldpnetv2": 1,
    "ldpnetv2_nopool": 0,
    "pw2_pool": 0,
    "pw2_pool_pos": 0,
    "ldpnet": 0,
    "mlp2x_gelu": 0,
}


def weights(channels=4, kernel=(3, 3), group_width=1, seed=0):
    generator = np.random.default_rng(seed)
    shape = (channels, group_width, *kernel)
    return {
        "w": generator.standard_normal(shape, dtype=np.float32),
        "b": generator.standard_normal(channels, dtype=np.float32),
    }


@pytest.mark.parametrize("text", [BEFORE, WITH_SKIP], ids=["plain", "skip"])
def test_before_and_expected(text):
    graph = parse_graph(text, **weights())
    result = check_pass(FusePoolIntoDepthwise(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    wide = np.zeros((4, 1, 6, 6), np.float32)
    assert_same_structure(graph, parse_graph(EXPECTED, w=wide, b=weights()["b"]))


@pytest.mark.parametrize("text", [BEFORE, WITH_SKIP], ids=["plain", "skip"])
def test_every_tap_of_the_kernel(text):
    graph = parse_graph(text, **weights())
    FusePoolIntoDepthwise().apply(graph)
    found, source = constants(graph)["w.with_pool"], weights()["w"]
    for row, column in np.ndindex(6, 6):
        tap = source[:, 0, row // 2, column // 2].copy()
        if text is WITH_SKIP and (row // 2, column // 2) == (1, 1):
            tap += 1
        np.testing.assert_array_equal(found[:, 0, row, column], tap / 4)


def test_the_skip_may_be_folded_first():
    graph, folded = parse_graph(WITH_SKIP, **weights()), parse_graph(WITH_SKIP, **weights())
    FoldPegSkip().apply(folded)
    assert check_pass(FusePoolIntoDepthwise(), folded).rewritten == 1
    FusePoolIntoDepthwise().apply(graph)
    assert_same_structure(graph, folded)
    found = constants(folded)["w.with_skip.with_pool"]
    np.testing.assert_array_equal(found, constants(graph)["w.with_pool"])


def test_the_skip_may_be_the_first_operand():
    graph = parse_graph(WITH_SKIP.replace("Add(c, p)", "Add(p, c)"), **weights())
    assert check_pass(FusePoolIntoDepthwise(), graph).rewritten == 1
    assert [node.op for node in graph.nodes] == ["Conv"]


def test_what_is_replaced_reads_nothing():
    graph = parse_graph(WITH_SKIP, **weights())
    FusePoolIntoDepthwise().run(graph)
    fused = graph.outputs[0].inputs[0]
    assert consumers(fused.outputs[0]) == []
    assert consumers(graph.inputs[0]) == [fused]


def test_an_add_of_another_domain_is_no_skip():
    text = WITH_SKIP.replace('["" : 20]', '["" : 20, "my" : 1]').replace("= Add", "= my.Add")
    result = FusePoolIntoDepthwise().apply(parse_graph(text, **weights()))
    assert "'p' inside it is also read by Add" in result.refusals[0].reason


def test_an_addition_of_something_else_stays():
    text = WITH_SKIP.replace("Add(c, p)", "Add(c, r)").replace("[B,4,6,8] x", "[B,4,6,8] x, Z")
    text = text.replace("Z", "float[B,4,3,4] r")
    graph = parse_graph(text, **weights())
    assert check_pass(FusePoolIntoDepthwise(), graph).rewritten == 1
    assert [node.op for node in graph.nodes] == ["Conv", "Add"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("strides=[2,2]", "strides=[1,1]"), "its strides are [1, 1]"),
        (("strides=[2,2]", "strides=[2,2], pads=[1,1,1,1]"), "padded by [1, 1, 1, 1]"),
        (("strides=[2,2]", "strides=[2,2], ceil_mode=1"), "ceil_mode"),
        (("[B,4,6,8]", "[B,4,7,8]"), "the map of [7, 8] is no multiple"),
        (("[B,4,6,8]", "[B,4,H,8]"), "size of the map 'x' is not known"),
        (("pads=[1,1,1,1]", "pads=[0,0,0,0]"), "do not keep the map's size"),
        (("pads=[1,1,1,1]", "pads=[2,2,2,2], dilations=[2,2]"), "dilations are [2, 2]"),
        (("pads=[1,1,1,1]", "pads=[1,1,1,1], strides=[2,2]"), "strides are [2, 2], not 1"),
        (("group=4", "group=2"), "2 groups, it is not depthwise"),
        (("\n}", "\n  z = Relu(p)\n}"), "'p' inside it is also read by Relu"),
        (("\n}", "\n  z = Relu(w)\n}"), "'w' is shared with Relu"),
        (("[B,4,6,8] x", "[B,4,6,8] x, float[4,1,3,3] w"), "'w' is an input of the graph"),
    ],
    ids=[
        *("overlap", "pool-pads", "ceil", "not-a-multiple", "dynamic", "pads", "dilations"),
        *("strides", "dense", "read-elsewhere", "shared", "graph-input"),
    ],
)
def test_refusals(change, reason):
    assert change[0] in BEFORE
    text, used = BEFORE.replace(*change), weights()
    text = text.replace("[B,4,3,4] y", "[B,4,I,J] y")
    if "z =" in text:
        text = text.replace(" y)", " y, float[M,N,O,P] z)")
    if "an input" in reason:
        text = text.replace("<float[4,1,3,3] w, ", "<")
        used.pop("w")
    if "2 groups" in reason:
        text, used = text.replace("[4,1,3,3]", "[4,2,3,3]"), weights(group_width=2)
    result = FusePoolIntoDepthwise().apply(parse_graph(text, **used))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_an_even_kernel_has_no_same_padding():
    text = BEFORE.replace("3,3", "2,2").replace("[1,1,1,1]", "[1,1,0,0]")
    result = FusePoolIntoDepthwise().apply(parse_graph(text, **weights(kernel=(2, 2))))
    assert "has no centre" in result.refusals[0].reason


def test_a_convolution_before_the_skip_that_is_read_elsewhere():
    text = WITH_SKIP.replace("\n}", "\n  z = Relu(c)\n}")
    text = text.replace(" y)", " y, float[B,4,3,4] z)")
    result = FusePoolIntoDepthwise().apply(parse_graph(text, **weights()))
    assert "'c' inside it is also read by Relu" in result.refusals[0].reason


def test_a_pooled_map_that_is_an_output():
    text = BEFORE.replace(" y)", " y, float[B,4,3,4] p)")
    result = FusePoolIntoDepthwise().apply(parse_graph(text, **weights()))
    assert "'p' inside it is also an output" in result.refusals[0].reason


def test_another_op_between_is_no_match():
    text = BEFORE.replace("Conv<", "Conv <").replace("(p, w, b)", "(r, w, b)")
    text = text.replace("  y =", "  r = Relu(p)\n  y =")
    assert FusePoolIntoDepthwise().apply(parse_graph(text, **weights())).matched == 0


@settings(deadline=None, max_examples=50)
@given(
    step=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 2),
    pooled=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 5),
    skip=st.booleans(),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(step, kernel, pooled, channels, skip, batch, seed):
    """Borders too: many of these maps are smaller than the kernel."""
    pads = [size // 2 for size in kernel] * 2
    text = (
        (WITH_SKIP if skip else BEFORE)
        .replace("4,6,8]", f"{channels},{pooled[0] * step[0]},{pooled[1] * step[1]}]")
        .replace("4,3,4]", f"{channels},{pooled[0]},{pooled[1]}]")
        .replace("[4,1,3,3]", f"[{channels},1,{kernel[0]},{kernel[1]}]")
        .replace("float[4]", f"float[{channels}]")
        .replace("group=4", f"group={channels}")
        .replace("[3,3]", str(list(kernel)))
        .replace("[1,1,1,1]", str(pads))
        .replace("[2,2]", str(list(step)))
    )
    graph = parse_graph(text, **weights(channels, kernel, seed=seed))
    assert check_pass(FusePoolIntoDepthwise(), graph, {"B": batch}).rewritten == 1


@pytest.mark.parametrize(("kind", "count"), COUNTS.items())
def test_the_captured_projectors(kind, count):
    graph = tiny_graph("projector", mm_projector_type=kind)
    result = check_pass(FusePoolIntoDepthwise(), graph)
    assert (result.matched, result.rewritten) == (count, count)


def test_nano():
    graph = nano_graph("projector")
    source = constants(graph)["peg.peg.0.weight"]
    assert check_pass(FusePoolIntoDepthwise(), graph).rewritten == 1
    fused = graph.tensors()["peg.peg.0.weight.with_pool"]
    assert is_deferred(fused)
    blocks = constants(graph)[fused.name].reshape(-1, 1, 3, 2, 3, 2).sum((3, 5))
    source[:, 0, 1, 1] += 1
    assert_close(blocks, source)
