"""LDP's inverted residual block on [B, H, W, C]."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.projector.move_block_to_channels_last import MoveBlockToChannelsLast
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
g (float[B,5,6,8] x) => (float[B,5,6,7] y)
  <float[4,8,1,1] f, float[4] fb, float[8,4,1,1] e, float[8] eb, float[7,8,1,1] p,
   int64[2] axes = {2, 3}> {
  t = Transpose<perm=[0,3,1,2]>(x)
  a = HardSwish(t)
  m = ReduceMean<keepdims=1>(a, axes)
  s = Conv<kernel_shape=[1,1]>(m, f, fb)
  r = Relu(s)
  u = Conv<kernel_shape=[1,1]>(r, e, eb)
  h = HardSigmoid<alpha=0.25, beta=0.5>(u)
  g1 = Mul(a, h)
  c = Conv<kernel_shape=[1,1]>(g1, p)
  y = Transpose<perm=[0,2,3,1]>(c)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,5,6,8] x) => (float[B,5,6,7] y)
  <float[8,4] f, float[4] fb, float[4,8] e, float[8] eb, float[8,7] p,
   int64[2] axes = {1, 2}> {
  a = HardSwish(x)
  m = ReduceMean<keepdims=1>(a, axes)
  s = MatMul(m, f)
  sb = Add(s, fb)
  r = Relu(sb)
  u = MatMul(r, e)
  ub = Add(u, eb)
  h = HardSigmoid<alpha=0.25, beta=0.5>(ub)
  g1 = Mul(a, h)
  y = MatMul(g1, p)
}
"""
KINDS = {
    "ldpnetv2": 0,
    "ldpnetv2_nopool": 0,
    "pw2_pool": 0,
    "pw2_pool_pos": 0,
    "ldpnet": 2,
    "mlp2x_gelu": 0,
}


def weights(channels=8, squeezed=4, outer=7, seed=0):
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return generator.standard_normal(shape, dtype=np.float32)

    return {
        "f": normal(squeezed, channels, 1, 1),
        "fb": normal(squeezed),
        "e": normal(channels, squeezed, 1, 1),
        "eb": normal(channels),
        "p": normal(outer, channels, 1, 1),
    }


def test_before_and_expected():
    graph = parse_graph(BEFORE, **weights())
    result = check_pass(MoveBlockToChannelsLast(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    matrices = {k: v[:, :, 0, 0].T if v.ndim == 4 else v for k, v in weights().items()}
    assert_same_structure(graph, parse_graph(EXPECTED, **matrices))


@pytest.mark.parametrize("name", ["f", "e", "p"])
def test_kernels_become_matrices(name):
    graph = parse_graph(BEFORE, **weights())
    MoveBlockToChannelsLast().apply(graph)
    found = constants(graph)[f"{name}.matrix"]
    np.testing.assert_array_equal(found, weights()[name][:, :, 0, 0].T)
    assert found.flags.c_contiguous


@pytest.mark.parametrize(
    "change",
    [
        ("Mul(a, h)", "Mul(h, a)"),
        ("{2, 3}", "{-1, -2}"),
        ("(g1, p)", "(g1, p, pb)"),
        ("(r, e, eb)", "(r, e)"),
    ],
    ids=["operands", "negative-axes", "bias", "no-bias"],
)
def test_other_forms(change):
    text, used = BEFORE.replace(*change), weights()
    if "pb" in text:
        text = text.replace("float[8] eb", "float[8] eb, float[7] pb")
        used["pb"] = np.arange(7, dtype=np.float32)
    if "eb)" not in text:
        used.pop("eb")
        text = text.replace("float[8] eb, ", "")
    assert check_pass(MoveBlockToChannelsLast(), parse_graph(text, **used)).rewritten == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("[0,3,1,2]", "[0,3,2,1]")], "'t' is transposed by [0, 3, 2, 1]"),
        ([("perm=[0,2,3,1]", "perm=[0,3,2,1]")], "'y' is transposed by [0, 3, 2, 1]"),
        ([("{2, 3}", "{1, 3}"), ("[4,8,1,1] f", "[4,1,1,1] f")], "over axes [1, 3]"),
        ([("}> {", "}> {\n  k = Identity(axes)"), ("(a, axes)", "(a, k)")], "axes 'k' of the"),
        ([("(g1, p)", "(g1, p2)"), ("{\n", "{\n  p2 = Neg(p)\n")], "computed by Neg"),
        ([("[1,1]>(g1", "[1,1], strides=[2,2]>(g1")], "are [2, 2], not 1"),
        ([("[1,1]>(g1", "[1,1], pads=[1,1,1,1]>(g1")], "is padded by [1, 1, 1, 1]"),
        ([("[1,1]>(g1", "[1,1], group=2>(g1"), ("[7,8,1,1] p", "[6,4,1,1] p")], "2 groups"),
        ([("[1,1]>(g1", "[3,3]>(g1"), ("[7,8,1,1] p", "[7,8,3,3] p")], "is [3, 3], not 1 x 1"),
        ([("\n}", "\n  z = Neg(p)\n}")], "'p' is shared with Neg"),
        ([("\n}", "\n  z = Neg(a)\n}")], "'a' inside it is also read by Neg"),
        (
            [(" x) =>", " x, float[7,8,1,1] p) =>"), ("[7,8,1,1] p,\n", "[1] q,\n")],
            "an input of",
        ),
    ],
    ids=[
        *("enter", "leave", "axes", "computed-axes", "computed", "strides", "pads", "groups"),
        *("kernel", "shared", "read-elsewhere", "graph-input"),
    ],
)
def test_refusals(changes, reason):
    text, used = BEFORE.replace("float[B,5,6,7] y", "float[B,I,J,K] y"), weights()
    for change in changes:
        assert change[0] in text
        text = text.replace(*change, 1)
    if "z =" in text:
        text = text.replace(" y)", " y, float[M,N,O,P] z)")
    shapes = {
        "over": ("f", (4, 1, 1, 1)),
        "2 gr": ("p", (6, 4, 1, 1)),
        "is [": ("p", (7, 8, 3, 3)),
    }
    if reason[:4] in shapes:
        name, shape = shapes[reason[:4]]
        used[name] = np.ones(shape, np.float32)
    if "an input" in reason:
        used.pop("p")
    result = MoveBlockToChannelsLast().apply(parse_graph(text, **used))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def test_one_channel_may_meet_several_gates():
    text = BEFORE.replace("5,6,8] x", "5,6,1] x").replace("[4,8,1,1] f", "[4,1,1,1] f")
    used = weights() | {"f": weights(channels=1)["f"]}
    assert check_pass(MoveBlockToChannelsLast(), parse_graph(text, **used)).rewritten == 1


def test_another_activation_is_no_match():
    text = BEFORE.replace("HardSwish(t)", "Gelu(t)")
    assert MoveBlockToChannelsLast().apply(parse_graph(text, **weights())).matched == 0


@settings(deadline=None, max_examples=40)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9)),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_size(grid, widths, batch, seed):
    channels, squeezed, outer = widths
    text = (
        BEFORE.replace("[B,5,6,8]", f"[B,{grid[0]},{grid[1]},{channels}]")
        .replace("[B,5,6,7]", f"[B,{grid[0]},{grid[1]},{outer}]")
        .replace("float[4,8,1,1] f, float[4]", f"float[{squeezed},{channels},1,1] f, float[F]")
        .replace("float[8,4,1,1] e, float[8]", f"float[{channels},{squeezed},1,1] e, float[E]")
        .replace("float[7,8,1,1]", f"float[{outer},{channels},1,1]")
        .replace("float[F]", f"float[{squeezed}]")
        .replace("float[E]", f"float[{channels}]")
    )
    graph = parse_graph(text, **weights(channels, squeezed, outer, seed))
    assert check_pass(MoveBlockToChannelsLast(), graph, {"B": batch}).rewritten == 1


@pytest.mark.parametrize(("kind", "count"), KINDS.items())
def test_the_captured_projectors(kind, count):
    graph = tiny_graph("projector", mm_projector_type=kind)
    result = check_pass(MoveBlockToChannelsLast(), graph)
    assert (result.matched, result.rewritten) == (count, count)


def test_what_is_left_of_the_captured_block():
    graph = tiny_graph("projector", mm_projector_type="ldpnet")
    MoveBlockToChannelsLast().apply(graph)
    operators = [node.op for node in graph.nodes]
    assert operators.count("Conv") == 2, "the depthwise ones"
    assert operators.count("Transpose") == 6, "four of ten went"
    made = [t for name, t in graph.tensors().items() if name.endswith(".matrix")]
    assert len(made) == 6
    assert all(is_deferred(tensor) for tensor in made)


def test_nano_has_no_such_block():
    assert check_pass(MoveBlockToChannelsLast(), nano_graph("projector")).matched == 0
