"""Tables in place of computed rotary angles."""

import numpy as np
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.decoder.constant_rotary_tables import ConstantRotaryTables
from mvlm_export.passes.decoder.fold_rotary_sign import FoldRotarySign
from mvlm_export.passes.editing import consumers
from mvlm_export.passes.graph_io import import_graph
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    nano_graph,
    parse_graph,
    tiny_graph,
)

HEADER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[S] pos) => (float[S,6] c, float[S,6] s)
  <float[3] freq, int64[1] last = {-1}, int64[1] zero = {0}>
"""
MUL = """{
  f = Cast<to=1>(pos)
  u = Unsqueeze(f, last)
  m = Mul(u, freq)
  t = Concat<axis=-1>(m, m)
  c = Cos(t)
  s = Sin(t)
}"""
OUTER = """{
  u = Unsqueeze(pos, last)
  f = Cast<to=1>(u)
  row = Unsqueeze(freq, zero)
  m = MatMul(f, row)
  t = Concat<axis=1>(m, m)
  c = Cos(t)
  s = Sin(t)
}"""
# As transformers writes it: [D/2, 1] x [1, S], turned.
TURNED = """{
  u = Unsqueeze(pos, zero)
  f = Cast<to=1>(u)
  column = Unsqueeze(freq, last)
  same = Expand(column, ones)
  turned = MatMul(same, f)
  m = Transpose<perm=[1,0]>(turned)
  t = Concat<axis=-1>(m, m)
  c = Cos(t)
  s = Sin(t)
}"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20]>
g (int64[S] pos) => (float[S,6] c, float[S,6] s) <float[40,6] cos, float[40,6] sin> {
  c = Gather<axis=0>(cos, pos)
  s = Gather<axis=0>(sin, pos)
}
"""
FORMS = pytest.mark.parametrize("form", [MUL, OUTER, TURNED], ids=["mul", "outer", "turned"])
TABLES = ConstantRotaryTables(40)


def frequencies(half=3, base=10000.0):
    return (base ** -(np.arange(half) / half)).astype(np.float32)


def graph_of(body, header=HEADER, half=3):
    if "ones" in body:
        header = header.replace("int64[1] zero", "int64[2] ones = {1,1}, int64[1] zero")
    return parse_graph(header + body, freq=frequencies(half))


@FORMS
def test_before_and_expected(form):
    graph = graph_of(form)
    result = check_pass(TABLES, graph, {"S": 7}, pos=40)
    assert (result.matched, result.rewritten) == (2, 2)
    empty = np.zeros((40, 6), np.float32)
    assert_same_structure(graph, parse_graph(EXPECTED, cos=empty, sin=empty))


@FORMS
def test_values(form):
    graph = graph_of(form)
    ConstantRotaryTables(3000).apply(graph)
    found = constants(graph)
    angles = np.arange(3000, dtype=np.float32)[:, None] * np.tile(frequencies(), 2)
    assert angles.dtype == np.float32
    exact = angles.astype(np.float64)
    np.testing.assert_allclose(found["rotary_cos_table"], np.cos(exact), rtol=0, atol=6e-8)
    np.testing.assert_allclose(found["rotary_sin_table"], np.sin(exact), rtol=0, atol=6e-8)


def test_large_positions_agree_with_the_graph():
    assert check_pass(ConstantRotaryTables(4096), graph_of(MUL), {"S": 64}, pos=4096).rewritten


def test_without_repetition_the_table_is_half_as_wide():
    text = MUL.replace("  t = Concat<axis=-1>(m, m)\n", "").replace("(t)", "(m)")
    graph = graph_of(text, HEADER.replace(",6]", ",3]"))
    assert check_pass(TABLES, graph, pos=40).rewritten == 2
    assert constants(graph)["rotary_cos_table"].shape == (40, 3)


def test_rows_get_the_axes_that_the_graph_gave_them():
    text = MUL.replace("(f, last)", "(f, both)").replace("Concat<axis=-1>", "Concat<axis=3>")
    header = HEADER.replace("[S,6]", "[1,S,1,6]").replace(
        "<float", "<int64[3] both={0,2,3}, float"
    )
    graph = graph_of(text, header)
    assert check_pass(TABLES, graph, pos=40).rewritten == 2
    assert [node.op for node in graph.nodes].count("Unsqueeze") == 2


def test_angles_of_every_layer_share_one_table():
    text = MUL.replace("  s = Sin(t)", "  t2 = Concat<axis=-1>(m, m)\n  s = Cos(t2)")
    graph = graph_of(text)
    assert check_pass(TABLES, graph, pos=40).rewritten == 2
    assert list(constants(graph)) == ["rotary_cos_table"]


def test_a_batch_of_positions_and_a_scale_behind():
    text = MUL.replace("c = Cos(t)", "c0 = Cos(t)\n  c = Mul(c0, scale)")
    header = HEADER.replace("[S", "[B,S").replace("<float", "<float scale = {1.25}, float")
    assert check_pass(TABLES, graph_of(text, header), {"B": 2}, pos=40).rewritten == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("int64[S] pos)", "int64[S] pos, float[3] freq)"), ("float[3] freq, ", "")],
         "the frequencies 'freq' are an input of the graph"),
        ([("(u, freq)", "(u, g)"), ("  m =", "  g = Exp(freq)\n  m =")],
         "the frequencies 'g' are computed by Exp"),
        ([("Cast<to=1>(pos)", "Cast<to=1>(h)"), ("  f =", "  h = Cast<to=10>(pos)\n  f =")],
         "'h' is float16, the angles are not float32 throughout"),
        ([("(f, last)", "(f, zero)"), ("[S]", "[3]"), ("S,6", "1,6")],
         "is not each position times each of 3 numbers"),
        ([("float[3] freq", "float[2,3] freq"), ("S,6", "2,6"), ("[S]", "[2]")],
         "is not each position times each of 6 numbers"),
        ([("(f, last)", "(x, last)"), ("  u =", "  x = Expand(f, four)\n  u ="),
          ("S,6", "4,6"), ("[S]", "[1]")], "'c' is [4, 6], not a row for each position"),
    ],
    ids=["input", "computed", "float16", "one-to-one", "matrix", "expanded"],
)  # fmt: skip
def test_refusals(changes, reason):
    text = HEADER.replace("<float", "<int64[1] four = {4}, float") + MUL
    for old, new in changes:
        text = text.replace(old, new)
    weights = {"freq": frequencies()}
    if "[2,3]" in text:
        weights["freq"] = np.ones((2, 3), np.float32)
    if "input" in reason:
        weights = {}
    result = TABLES.apply(parse_graph(text, **weights))
    assert (result.matched, result.rewritten) == (2, 0)
    assert reason in result.refusals[0].reason


@pytest.mark.parametrize(
    ("old", "new"),
    [("Cast<to=1>(pos)", "Cast<to=1>(x)"), ("Cos(t)", "Tanh(t)"), ("(m, m)", "(m, n)")],
    ids=["floats", "function", "concat"],
)
def test_what_is_no_match(old, new):
    text = (HEADER + MUL).replace(old, new).replace("Sin(t)", "Relu(t)")
    text = text.replace("(int64[S] pos)", "(float[S] x)") if "(x)" in new else text
    text = text.replace("  t =", "  n = Neg(m)\n  t =") if "n)" in new else text
    assert TABLES.apply(parse_graph(text, freq=frequencies())).matched == 0


@pytest.mark.parametrize(
    "row",
    [
        "r = Expand(column, square)\n  m = Mul(u, r)",
        "e = Expand(column, square)\n  r = Unsqueeze(e, one)\n  p = Unsqueeze(u, one)\n"
        "  l = MatMul(p, r)\n  m = Squeeze(l, one)",
    ],
    ids=["mul", "matmul"],
)
def test_frequencies_that_are_repeated_one_by_one_are_refused(row):
    """[[a], [b]] expanded to [[a, a], [b, b]] is no row [a, b]."""
    text = HEADER.replace("[S]", "[3]").replace("S,6", "3,6") + MUL
    text = text.replace("<float", "<int64[2] square = {3,3}, int64[1] one = {1}, float")
    text = text.replace("m = Mul(u, freq)", f"column = Unsqueeze(freq, last)\n  {row}")
    if "Squeeze" in row:  # Cos and Sin keep the axis, so that the product is theirs.
        text = text.replace("  m = Squeeze(l, one)\n", "").replace("(m, m)", "(l, l)")
        text = text.replace("3,6]", "3,1,6]")
    result = TABLES.apply(parse_graph(text, freq=frequencies()))
    assert (result.matched, result.rewritten) == (2, 0)
    assert "repeats numbers of 'column', not the row of them" in result.refusals[0].reason


@pytest.mark.parametrize("source", [np.float32, np.int64])
def test_frequencies_that_were_integers_are_refused(source):
    text = (HEADER + MUL).replace("Mul(u, freq)", "Mul(g, u)")
    casts = "  i = Cast<to=7>(freq)\n  g = Cast<to=1>(i)\n"
    text = text.replace("  m =", casts + "  m =")
    if source is np.int64:
        text = text.replace("float[3] freq", "int64[3] freq")
    result = TABLES.apply(parse_graph(text, freq=np.array([3, 2, 1], source)))
    assert (result.matched, result.rewritten) == (2, 0)
    assert "is int64, the angles are not float32 throughout" in result.refusals[0].reason


def test_functions_of_another_domain_are_no_match():
    text = (HEADER + MUL).replace('["" : 20]', '["" : 20, "my" : 1]')
    text = text.replace("= Cos", "= my.Cos").replace("= Sin", "= my.Sin")
    assert TABLES.apply(parse_graph(text, freq=frequencies())).matched == 0


def test_what_is_replaced_reads_nothing():
    graph = graph_of(MUL)
    angles = graph.tensors()["t"]
    TABLES.run(graph)
    assert consumers(angles) == []


def test_bad_setting():
    with pytest.raises(PassError, match="max_position_embeddings"):
        ConstantRotaryTables(0)


@given(
    form=st.sampled_from([MUL, OUTER, TURNED]),
    half=st.integers(1, 8),
    base=st.floats(2, 1e6),
    positions=st.integers(1, 3000),
    rows=st.integers(1, 5),
)
def test_any_size(form, half, base, positions, rows):
    header = HEADER.replace(",6]", f",{2 * half}]").replace("float[3]", f"float[{half}]")
    if "ones" in form:
        header = header.replace("int64[1] zero", "int64[2] ones = {1,1}, int64[1] zero")
    graph = parse_graph(header + form, freq=frequencies(half, base))
    rewrite = ConstantRotaryTables(positions)
    assert check_pass(rewrite, graph, {"S": rows}, pos=positions).rewritten == 2


class Rotary(torch.nn.Module):
    """Rotates queries with angles computed at run time, as transformers' LLaMA does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        steps = torch.arange(0, width, 2, dtype=torch.int64).float()
        self.register_buffer("inv_freq", 1.0 / 10000.0 ** (steps / width))

    def forward(self, q, position_ids):
        rows = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        angles = (rows.float() @ position_ids[:, None, :].float()).transpose(1, 2)
        emb = torch.cat((angles, angles), dim=-1)
        cos, sin = (emb.cos() * 1.0).to(q.dtype), (emb.sin() * 1.0).to(q.dtype)
        half = q.shape[-1] // 2
        turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
        return q * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


@pytest.mark.parametrize("batch", [{}, {0: torch.export.Dim("B")}], ids=["1", "B"])
def test_a_module_as_torch_exports_it(batch):
    count = 1 + len(batch)
    args = (torch.zeros(count, 2, 5, 8), torch.arange(5).expand(count, 5).contiguous())
    rows = torch.export.Dim("S", min=1)
    axes = (batch | {2: rows}, batch | {1: rows})
    program = torch.onnx.export(
        Rotary(8).eval(), args, dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes=axes, input_names=["q", "p"], output_names=["y"],
    )  # fmt: skip
    graph = import_graph(onnx_ir.to_proto(program.model))
    sizes = {"B": 2, "S": 6}
    assert check_pass(ConstantRotaryTables(64), graph, sizes, p=64).rewritten == 2
    assert not {"Cos", "Sin", "MatMul", "Expand"} & {node.op for node in graph.nodes}
    assert check_pass(FoldRotarySign(), graph, sizes, rtol=0, p=64).rewritten == 1


def test_the_captured_decoder_gathers_already():
    graph = tiny_graph("decoder", num_key_value_heads=2)
    assert ConstantRotaryTables(256).apply(graph).matched == 0


def test_nano():
    assert ConstantRotaryTables(1024).apply(nano_graph("decoder")).matched == 0
