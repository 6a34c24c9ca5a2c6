"""Which nodes treat every row alone, and where a selection of rows comes to rest."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.base import Pass, Tally
from mvlm_export.passes.editing import producer
from mvlm_export.passes.row_selection import RowSelection, select_rows_early
from tests.passes.graphs import check_pass, parse_graph

HEADER = """
<ir_version: 10, opset_import: ["" : {opset}{more}]>
g ({inputs}) => ({outputs})
  <float[4,4] w, float[1,4] one_row, float[4] scale, float[5,4] per_row, float small = {{0.5}},
   int64[1] last = {{-1}}, int64[1] rows = {{-2}}, int64[2] two = {{2,2}},
   bool[4] mask = {{1,0,0,1}}>
"""
WEIGHTS = {"w": (4, 4), "one_row": (1, 4), "scale": (4,), "per_row": (5, 4)}


class KeepRows(Pass):
    """Selects rows of ``y`` from ``start`` to the last of five."""

    name = "keep-rows"
    summary = "for the tests"

    def __init__(self, start):
        self.start = start
        self.count = 5 - start if start >= 0 else -start

    def run(self, graph):
        tally = Tally()
        root = graph.outputs[0]
        if root.shape[-2] == self.count:
            return tally.result()
        problem = select_rows_early(graph, root, RowSelection(self.start, self.count, "some"))
        if problem is None:
            tally.rewrote()
        else:
            tally.refuse(producer(root), problem)
        return tally.result()

    def outputs_after(self, outputs, feeds):
        return {**outputs, "y": outputs["y"][..., self.start :, :]}


def graph_of(body, rank=2, opset=20, more="", inputs="", outputs=""):
    batch = "B," * (rank - 2)
    header = HEADER.format(
        opset=opset, more=more, inputs=f"float[{batch}5,4] x{inputs}",
        outputs=f"float[{batch}5,4] y{outputs}",
    )  # fmt: skip
    generator = np.random.default_rng(0)
    weights = {
        name: generator.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in WEIGHTS.items()
        if re.search(rf"\b{name}\b", body)
    }
    return parse_graph(header + "{\n" + body + "\n}", **weights)


ROW_WISE = {
    "matmul": "MatMul({0}, w)",
    "scale": "Mul({0}, scale)",
    "one-row": "Add({0}, one_row)",
    "scalar": "Div(small, {0})",
    "residual": "Add({0}, {0})",
    "sigmoid": "Sigmoid({0})",
    "erf": "Erf({0})",
    "clip": "Clip({0}, small)",
    "where": "Where(mask, {0}, small)",
    "gelu": "Gelu({0})",
    "softmax": "Softmax<axis=-1>({0})",
    "layer-norm": "LayerNormalization<axis=-1>({0}, scale, scale)",
    "normalize": "Sub({0}, {1})",
}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("node", ROW_WISE.values(), ids=ROW_WISE.keys())
def test_row_wise_nodes(node, rank):
    body = f"  m = ReduceMean<keepdims=1>(x, last)\n  y = {node.format('x', 'm')}"
    graph = graph_of(body, rank)
    assert check_pass(KeepRows(2), graph, {"B": 2}).rewritten == 1
    made = producer(graph.outputs[0])
    assert made.op == node.split("(")[0].split("<")[0]
    assert all(producer(t).op != made.op for t in made.inputs if producer(t) is not None)


@pytest.mark.parametrize("start", [0, 3, -1, -5])
def test_any_start(start):
    graph = graph_of("  a = Relu(x)\n  y = MatMul(a, w)")
    result = check_pass(KeepRows(start), graph)
    assert result.rewritten == (0 if start in (0, -5) else 1)


def test_splits_and_joins_along_the_last_axis():
    body = """
  a, b = Split<axis=-1>(x, two)
  s = Relu(a)
  c = Concat<axis=-1>(b, s)
  sq = ReduceSumSquare<keepdims=1>(c, last)
  y = Div(c, sq)"""
    graph = graph_of(body)
    assert check_pass(KeepRows(-1), graph).rewritten == 1
    assert graph.nodes[0].op == "Slice"
    assert [node.op for node in graph.nodes].count("Slice") == 1


def test_reductions_of_old_opsets_name_their_axes_as_attributes():
    body = "  m = ReduceMean<axes=[1], keepdims=1>(x)\n  y = Sub(x, m)"
    graph = graph_of(body, opset=17)
    assert check_pass(KeepRows(-1), graph).rewritten == 1
    assert graph.nodes[0].op == "Slice"


def test_rms_normalization_is_row_wise():
    graph = graph_of("  a = Abs(x)\n  y = RMSNormalization<axis=-1>(a, scale)", opset=23)
    assert check_pass(KeepRows(-1), graph).rewritten == 1
    assert graph.nodes[0].op == "Slice"


NOT_ROW_WISE = {
    "softmax": ("Softmax<axis=0>(x)", "along the axes [0], not the last alone"),
    "reduce": ("Mul(x, m)", None),
    "norm": ("LayerNormalization<axis=0>(x, per_row)", "along the axes [0]"),
    "product": ("MatMul(q, x)", "multiplies by 'x', which is no constant matrix"),
    "constant": ("Add(x, per_row)", "has the constant 'per_row', of several rows"),
    "other": ("CumSum(x, axis0)", "is not known to be row-wise"),
    "foreign": ("com.acme.Magic(x)", "is of the domain 'com.acme'"),
}


@pytest.mark.parametrize(("node", "reason"), NOT_ROW_WISE.values(), ids=NOT_ROW_WISE.keys())
def test_other_nodes_stay_below_the_selection(node, reason):
    before = {"m)": "  m = ReduceMean<keepdims=1>(x, rows)\n", "q,": "  q = MatMul(x, t)\n"}
    body = "".join(line for key, line in before.items() if key in node)
    if "q," in node:
        body = "  t = Transpose(x)\n" + body
    if "axis0" in node:
        body += "  flat = Shape<start=0, end=0>(x)\n  axis0 = ReduceSum<keepdims=0>(flat)\n"
    graph = graph_of(body + f"  y = {node}", more=', "com.acme" : 1')
    if reason is not None:
        assert reason in _refused(graph)
        return
    # The mean over rows is read in full: the selection stops in front of it.
    assert check_pass(KeepRows(-1), graph).rewritten == 1
    assert graph.tensors()["m"].shape == [1, 4]


def _refused(graph):
    result = KeepRows(-1).apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    return result.refusals[0].reason


def test_a_tensor_that_others_read_is_the_border():
    body = "  a = Relu(x)\n  b = MatMul(a, w)\n  c = Relu(b)\n  y = Add(c, a)\n  z = Neg(b)"
    graph = graph_of(body, outputs=", float[5,4] z")
    assert check_pass(KeepRows(-1), graph).rewritten == 1
    shapes = {name: graph.tensors()[name].shape[0] for name in "abcyz"}
    assert shapes == {"a": 5, "b": 5, "c": 1, "y": 1, "z": 5}


def test_several_outputs_of_one_node_are_all_asked_for():
    graph = graph_of("  t = Concat<axis=-1>(x, x)\n  y, z = Split<axis=-1, num_outputs=2>(t)",
                     outputs=", float[5,4] z")  # fmt: skip
    assert "'z' is also an output of the graph" in _refused(graph)
    body = (
        "  t = Concat<axis=-1>(x, x)\n  y, z = Split<axis=-1, num_outputs=2>(t)\n  r = Relu(z)"
    )
    assert "'z' is also read by Relu" in _refused(graph_of(body, outputs=", float[5,4] r"))


def test_an_input_as_output_is_refused():
    graph = graph_of("  y = Relu(x)")
    problem = select_rows_early(graph, graph.inputs[0], RowSelection(-1, 1, "some"))
    assert "'x' is also read by Relu" in problem
    graph = graph_of("  y = Relu(x)")
    graph.nodes.clear()
    graph.outputs[0].inputs.clear()
    assert "made by no node" in select_rows_early(
        graph, graph.outputs[0], RowSelection(-1, 1, "s")
    )


@given(data=st.data(), start=st.sampled_from([-1, -2, 1, 3]), rank=st.sampled_from([2, 3]))
@settings(max_examples=40)
def test_any_graph(data, start, rank):
    """Random graphs of row-wise nodes and some that are not: the numbers never change."""
    safe = [ROW_WISE[key] for key in ("matmul", "scale", "one-row", "sigmoid", "softmax")]
    kinds = [*safe, "Add({0}, {1})", "Sub({0}, {1})", "Softmax<axis=0>({0})"]
    lines = ["  t0 = Relu(x)"]
    for index in range(1, data.draw(st.integers(1, 8))):
        node = data.draw(st.sampled_from(kinds))
        operands = [f"t{data.draw(st.integers(0, index - 1))}" for _ in range(2)]
        lines.append(f"  t{index} = {node.format(*operands)}")
    lines.append(f"  y = MatMul(t{len(lines) - 1}, w)")
    graph = graph_of("\n".join(lines), rank)
    assert check_pass(KeepRows(start), graph, {"B": 2}).rewritten == 1
