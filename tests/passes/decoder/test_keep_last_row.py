"""The last row of logits alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.decoder.keep_last_row import KeepLastRow
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    check_pass,
    nano_graph,
    parse_graph,
    random_feeds,
    run_graph,
    tiny_graph,
)

HEADER = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,4] h) => (float[{rows},9] logits)
  <float[4,4] o, float[4] g, float[4,6] u, float[4,6] v, float[6,4] d, float[4,9] head,
   int64[1] last = {{-1}}, float eps = {{0.01}}, int64[2] halves = {{6,6}}, float[4,12] uv,
   int64[1] end = {{9223372036854775807}}, int64[1] zero = {{0}}, int64[1] one = {{1}}>
"""
ATTENTION = """
  t = Transpose(h)
  m = MatMul(h, t)
  {a} = MatMul(m, h)
"""
TAIL = """
  p = MatMul(a, o)
  r = Add({h}, p)
  rr = Mul(r, r)
  mean = ReduceMean<keepdims=1>(rr, last)
  me = Add(mean, eps)
  sq = Sqrt(me)
  rs = Reciprocal(sq)
  n0 = Mul(r, rs)
  n = Mul(n0, g)
  {gate_up}
  s = Sigmoid(f)
  w = Mul(f, s)
  wu = Mul(w, up)
  k = MatMul(wu, d)
  x = Add(r, k)
  logits = MatMul(x, head)
"""
APART = "f = MatMul(n, u)\n  up = MatMul(n, v)"
MERGED = "fu = MatMul(n, uv)\n  f, up = Split<axis=-1>(fu, halves)"
SLICES = """
  a = Slice(a0, last, end, zero, one)
  h1 = Slice(h, last, end, zero, one)
"""


def before(gate_up=APART):
    body = ATTENTION.format(a="a") + TAIL.format(h="h", gate_up=gate_up)
    return HEADER.format(rows="S") + "{" + body + "}"


def expected(gate_up=APART):
    body = ATTENTION.format(a="a0") + SLICES + TAIL.format(h="h1", gate_up=gate_up)
    return HEADER.format(rows=1) + "{" + body + "}"


def weights(text, seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"o": (4, 4), "g": (4,), "u": (4, 6), "v": (4, 6), "d": (6, 4), "head": (4, 9)}
    shapes |= {"uv": (4, 12)}
    read = text.split("{", 1)[1].replace("(", " ").replace(")", " ").replace(",", " ").split()
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
        if name in read
    }


def graph_of(text):
    return parse_graph(text, **weights(text.rsplit("one =", 1)[1]))


@pytest.mark.parametrize("gate_up", [APART, MERGED], ids=["apart", "merged"])
def test_before_and_expected(gate_up):
    graph = graph_of(before(gate_up))
    result = check_pass(KeepLastRow(), graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, graph_of(expected(gate_up)))
    assert graph.outputs[0].shape == [1, 9]


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_any_number_of_rows(rows):
    assert check_pass(KeepLastRow(), graph_of(before()), {"S": rows}).rewritten == 1


def test_what_the_head_reads_is_one_row_and_the_attention_all():
    graph = graph_of(before())
    KeepLastRow().apply(graph)
    tensors = graph.tensors()
    assert {tensors[name].shape[0] for name in ("x", "n", "f", "me", "r", "p")} == {1}
    assert {tensors[name].shape[0] for name in ("a", "m")} == {"S"}


def test_the_last_row_is_found_whatever_stands_before():
    text = before()
    outputs = KeepLastRow().outputs_after({"logits": np.arange(6).reshape(3, 2), "k": 1}, {})
    np.testing.assert_array_equal(outputs["logits"], [[4, 5]])
    assert outputs["k"] == 1
    assert KeepLastRow().outputs_after({"k": 1}, {}) == {"k": 1}
    assert KeepLastRow("scores").apply(graph_of(text)).matched == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("MatMul(x, head)", "MatMul(x, th)", "by 'th', which is no constant matrix"),
        (
            "MatMul(x, head)",
            "Softmax<axis=0>(y)",
            "Softmax 'node_17' works along the axes [0]",
        ),
        ("MatMul(x, head)", "MatMul(x, head)\n  z = Relu(logits)", "also read by Relu"),
        ("MatMul(x, head)", "CumSum(y, zero0)", "not known to be row-wise"),
    ],
    ids=["computed-head", "across-rows", "read-elsewhere", "unknown"],
)
def test_refusals(old, new, reason):
    text = before().replace(old, new)
    if "th)" in new:
        text = text.replace("float[S,4] h)", "float[S,4] h, float[4,9] e)")
        text = text.replace("  logits =", "  th = Relu(e)\n  logits =").replace(
            ", float[4,9] head", ""
        )
    if "(y" in new:
        text = text.replace("  logits =", "  y = MatMul(x, head)\n  logits =")
        text = text.replace("int64[1] zero", "int64 zero0 = {0}, int64[1] zero")
    if "z =" in new:
        text = text.replace("[S,9] logits)", "[S,9] logits, float[S,9] z)")
    result = KeepLastRow().apply(graph_of(text))
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason.split("'node")[0] in result.refusals[0].reason


def test_a_refused_graph_keeps_its_rows():
    text = before().replace("logits =", "y =", 1).rstrip().removesuffix("}")
    graph = graph_of(text + "  logits = Softmax<axis=0>(y)\n}")
    assert check_pass(KeepLastRow(), graph).rewritten == 0


def test_a_bias_a_cast_and_a_quantized_head_are_row_wise():
    text = before().replace(
        "logits = MatMul(x, head)",
        """
  scale = Cast<to=10>(head)
  back = Cast<to=1>(scale)
  turned = Transpose<perm=[1,0]>(back)
  again = Transpose<perm=[1,0]>(turned)
  y = MatMul(x, again)
  b = Add(y, eps)
  c = Cast<to=10>(b)
  logits = Cast<to=1>(c)""",
    )
    graph = graph_of(text)
    assert check_pass(KeepLastRow(), graph, rtol=2e-3).rewritten == 1
    assert graph.tensors()["p"].shape == [1, 4]


def test_what_the_caller_also_wants_keeps_its_rows():
    text = before().replace("[S,9] logits)", "[S,9] logits, float[S,4] r)")
    graph = graph_of(text)
    assert check_pass(KeepLastRow(), graph).rewritten == 1
    assert graph.tensors()["r"].shape == ["S", 4]
    assert graph.tensors()["p"].shape == ["S", 4]
    assert graph.tensors()["x"].shape == [1, 4]
    assert [node.op for node in graph.nodes].count("Slice") == 1


def test_one_row_already_is_no_match():
    text = expected()
    assert KeepLastRow().apply(graph_of(text)).matched == 0


@given(
    rows=st.integers(1, 6),
    past=st.integers(0, 5),
    heads=st.sampled_from([4, 2]),
)
@settings(max_examples=12)
def test_any_prompt(rows, past, heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    sizes = {"S": rows, "T": past, "I": 2}
    assert check_pass(KeepLastRow(), graph, sizes, input_ids=322).rewritten == 1


@pytest.mark.parametrize("heads", [4, 2])
def test_the_captured_decoder(heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    assert check_pass(KeepLastRow(), graph, {"S": 4, "I": 9}, input_ids=325).rewritten == 1
    shapes = {output.name: output.shape for output in graph.outputs}
    assert shapes.pop("logits") == [1, 320]
    assert {tuple(shape) for shape in shapes.values()} == {("S", heads, 16)}


@pytest.mark.parametrize("gate_up", [APART, MERGED], ids=["apart", "merged"])
def test_the_last_few_rows_before_and_expected(gate_up):
    graph = graph_of(before(gate_up))
    assert check_pass(KeepLastRow(count=3), graph, {"S": 7}).rewritten == 1
    text = expected(gate_up).replace("float[1,9] logits", "float[R,9] logits")
    text = text.replace("int64[1] last = {-1}", "int64[1] last = {-1}, int64[1] first = {-3}")
    text = text.replace("Slice(a0, last,", "Slice(a0, first,")
    text = text.replace("Slice(h, last,", "Slice(h, first,")
    assert_same_structure(graph, graph_of(text))
    assert graph.outputs[0].shape == ["R", 9]
    assert KeepLastRow(count=3).apply(graph).matched == 0, "nothing is left to do"


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 12])
def test_as_many_rows_as_there_are(count, rows):
    graph = tiny_graph("decoder")
    whole = graph.copy()
    assert KeepLastRow(count=count).apply(graph).rewritten == 1
    feeds = random_feeds(graph, {"S": rows, "T": 3, "I": 2}, input_ids=322)
    found, all_rows = run_graph(graph, feeds), run_graph(whole, feeds)
    assert found["logits"].shape == (min(rows, count), 320)
    assert_close(found["logits"], all_rows["logits"][-count:])
    for name in found.keys() - {"logits"}:
        np.testing.assert_array_equal(found[name], all_rows[name])


def test_nano():
    graph = nano_graph("decoder")
    assert check_pass(KeepLastRow(), graph, {"S": 5}, input_ids=512).rewritten == 1
    readers = {t.name: node for node in graph.nodes for t in node.inputs}
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert readers[f"model.layers.3.{name}.weight"].inputs[0].shape[0] == 1
        assert readers[f"model.layers.2.{name}.weight"].inputs[0].shape[0] == "S"
    assert readers["lm_head.weight"].inputs[0].shape == [1, 256]
    assert readers["model.layers.3.self_attn.k_proj.weight"].inputs[0].shape[0] == "S"
