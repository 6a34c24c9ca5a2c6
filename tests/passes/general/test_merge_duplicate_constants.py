"""Constants that hold the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.passes.deferred import DeferredValues
from mvlm_export.passes.general.merge_duplicate_constants import MergeDuplicateConstants
from tests.passes.graphs import assert_same_structure, check_pass, nano_graph, parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BEFORE = (
    HEAD
    + """
g (float[B,4] x) => (float[B,4] y) <float[4] u, float[4] v, float[4] w> {
  a = Mul(x, u)
  b = Add(a, v)
  y = Sub(b, w)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float[B,4] x) => (float[B,4] y) <float[4] u, float[4] w> {
  a = Mul(x, u)
  b = Add(a, u)
  y = Sub(b, w)
}
"""
)
ONES, TWOS = np.ones(4, np.float32), np.full(4, 2, np.float32)
WEIGHTS = {"u": ONES, "v": ONES.copy(), "w": TWOS}


def names(graph):
    return [tensor.name for node in graph.nodes for tensor in node.inputs[1:]]


def test_before_and_expected():
    graph = parse_graph(BEFORE, **WEIGHTS)
    result = check_pass(MergeDuplicateConstants(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, parse_graph(EXPECTED, u=ONES, w=TWOS))
    assert names(graph) == ["u", "u", "w"]


@pytest.mark.parametrize(
    "other",
    [np.ones(4, np.float16), np.ones((1, 4), np.float32), np.array([1, 1, 1, -1], np.float32)],
    ids=["dtype", "shape", "values"],
)
def test_what_differs_is_kept(other):
    text = BEFORE.replace("b = Add(a, v)", "c = Cast<to=1>(v)\n  b = Add(a, c)")
    graph = parse_graph(text.replace("float[4] v, ", ""), u=ONES, v=other, w=TWOS)
    assert MergeDuplicateConstants().apply(graph).matched == 0


def test_negative_zero_is_not_zero():
    graph = parse_graph(BEFORE, u=np.zeros(4, np.float32), v=-np.zeros(4, np.float32), w=TWOS)
    assert MergeDuplicateConstants().apply(graph).matched == 0


def deferred(values, reads):
    def read():
        reads.append(1)
        return values

    return DeferredValues(values.shape, values.dtype, read)


def test_small_deferred_constants_are_compared_by_content():
    graph, reads = parse_graph(BEFORE, **WEIGHTS), []
    for name in ("u", "v"):
        graph.tensors()[name].values = deferred(WEIGHTS[name], reads)
    assert check_pass(MergeDuplicateConstants(), graph).rewritten == 1


@pytest.mark.parametrize("same", [True, False])
def test_large_constants_are_one_only_where_they_hold_one_object(same):
    graph, reads = parse_graph(BEFORE, **WEIGHTS), []
    one = deferred(ONES, reads)
    graph.tensors()["u"].values = one
    graph.tensors()["v"].values = one if same else deferred(ONES, reads)
    result = MergeDuplicateConstants(limit=8).apply(graph)
    assert (result.rewritten, reads) == (int(same), [])


def test_an_input_of_the_graph_is_refused():
    graph = parse_graph(BEFORE, **WEIGHTS)
    graph.inputs.append(graph.tensors()["v"])
    result = MergeDuplicateConstants().run(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert "'v' is an input of the graph" in result.refusals[0].reason


def test_outputs_of_the_graph_that_no_node_reads():
    graph = parse_graph(BEFORE, **WEIGHTS)
    tensors = graph.tensors()
    graph.outputs += [tensors["u"], tensors["v"]]
    for node in graph.nodes:
        node.inputs[1] = tensors["w"]
    assert check_pass(MergeDuplicateConstants(), graph).matched == 0
    assert [tensor.name for tensor in graph.outputs] == ["y", "u", "v"]


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_any_constants(numbers):
    nodes = [f"t{i + 1} = Add(t{i}, c{i})" for i in range(len(numbers))]
    text = "\n".join(nodes).replace(f"t{len(numbers)} =", "y =")
    graph = parse_graph(
        f"{HEAD} g (float[B] t0) => (float[B] y) {{ {text} }}",
        **{f"c{i}": np.array(n, np.float32) for i, n in enumerate(numbers)},
    )
    result = check_pass(MergeDuplicateConstants(), graph)
    assert result.rewritten == len(numbers) - len(set(numbers))


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_captured_graphs_have_none(name):
    assert MergeDuplicateConstants().apply(nano_graph(name)).matched == 0


QUANTIZED = (
    HEAD
    + """
g (float[B,4] x) => (float[B,4] y)
<int8[4,4] one, int8[4,4] other, float[4] scale, int8[4] zero, int8[4] zero2, int8 a, int8 b,
 float step>
{
  q = QuantizeLinear(x, step, a)
  d = DequantizeLinear(q, step, b)
  w = DequantizeLinear<axis=1>(one, scale, zero)
  v = DequantizeLinear<axis=1>(other, scale, zero2)
  m = MatMul(d, w)
  y = MatMul(m, v)
}
"""
)


def test_zero_points_of_weights_are_kept_apart_and_those_of_activations_are_not():
    generator = np.random.default_rng(0)
    one, other = generator.integers(-127, 128, (2, 4, 4)).astype(np.int8)
    zeros = {name: np.zeros(4, np.int8) for name in ("zero", "zero2")}
    points = {name: np.array(0, np.int8) for name in ("a", "b")}
    step = np.array(0.05, np.float32)
    graph = parse_graph(
        QUANTIZED, one=one, other=other, scale=ONES, step=step, **zeros, **points
    )
    assert check_pass(MergeDuplicateConstants(), graph).rewritten == 1
    read = {
        node.outputs[0].name: node.inputs[2].name
        for node in graph.nodes
        if len(node.inputs) > 2
    }
    assert read == {"q": "a", "d": "a", "w": "zero", "v": "zero2"}
