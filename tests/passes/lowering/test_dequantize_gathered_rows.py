"""A quantized table read row by row: the same bits, and nothing dequantized whole."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.deferred import DeferredValues, is_deferred
from mvlm_export.passes.graph_io import bind_weight, to_model
from mvlm_export.passes.lowering.dequantize_gathered_rows import DequantizeGatheredRows
from tests.passes.graphs import (
    assert_same_structure,
    check_pass,
    constants,
    parse_graph,
    random_feeds,
    run_graph,
)

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
ROWS = (
    HEAD
    + """
g (int32[S] ids) => (float[S,48] y) <int8[40,48] q, float[40] s> {
  t = DequantizeLinear<axis=0>(q, s)
  y = Gather(t, ids)
}
"""
)
ROWS_AFTER = (
    HEAD
    + """
g (int32[S] ids) => (float[S,48] y) <int8[40,48] q, float[40] s> {
  a = Gather<axis=0>(q, ids)
  b = Gather<axis=0>(s, ids)
  y = DequantizeLinear<axis=0>(a, b)
}
"""
)
BLOCKS = (
    HEAD
    + """
g (int32[S] ids) => (float[S,48] y) <int4[40,48] q, float[40,3] s> {
  t = DequantizeLinear<axis=1, block_size=16>(q, s)
  y = Gather(t, ids)
}
"""
)
BLOCKS_AFTER = (
    HEAD
    + """
g (int32[S] ids) => (float[S,48] y) <int4[40,48] q, float[40,3] s> {
  y = com.microsoft.GatherBlockQuantized
      <bits=4, block_size=16, gather_axis=0, quantize_axis=1>(q, ids, s)
}
"""
)
BYTES_IN_BLOCKS = BLOCKS.replace("int4", "int8")


def graph_of(text, *changes, seed=0, **others):
    """The graph with random codes and scales of the shapes that its text declares."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    model = onnx.parser.parse_model(text.replace("int4[", "int8["))
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.value_info
    }
    generator = np.random.default_rng(seed)
    dtype = np.float16 if "float16[" in text else np.float32
    if "s" in shapes:
        others["s"] = generator.uniform(0.01, 1, shapes["s"]).astype(dtype)
    if "q" not in shapes:
        return parse_graph(text, **others)
    bits = 4 if "int4[" in text else 8
    codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shapes["q"])
    codes = codes.astype(ml_dtypes.int4 if bits == 4 else np.int8)
    graph = parse_graph(text.replace("int4[", "int8["), q=codes.astype(np.int8), **others)
    bind_weight(graph, "q", DeferredValues(codes.shape, codes.dtype, lambda: codes))
    return graph


def check_bits(graph, sizes=None, ids=40):
    """One rewrite, and every output is the same to the last bit."""
    before = graph.copy()
    result = check_pass(DequantizeGatheredRows(), graph, sizes, ids=ids)
    assert (result.matched, result.rewritten) == (1, 1)
    feeds = random_feeds(before, sizes, ids=ids)
    expected, found = run_graph(before, feeds), run_graph(graph, feeds)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ROWS, ROWS_AFTER),
        (BLOCKS, BLOCKS_AFTER),
        (
            BYTES_IN_BLOCKS,
            ROWS_AFTER.replace("[40] s", "[40,3] s").replace(
                "DequantizeLinear<axis=0>", "DequantizeLinear<axis=1, block_size=16>"
            ),
        ),
    ],
    ids=["int8", "int4", "int8-blocks"],
)
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_before_and_expected(before, after, dtype):
    graph = graph_of(before.replace("float[", f"{dtype}["))
    check_bits(graph)
    assert_same_structure(graph, graph_of(after.replace("float[", f"{dtype}[")))
    assert is_deferred(graph.tensors()["q"])
    onnx.checker.check_model(to_model(graph), full_check=True)


@pytest.mark.parametrize("text", [ROWS, BLOCKS])
def test_codes_and_scales_stay_as_they_are(text):
    graph = graph_of(text)
    before = constants(graph)
    DequantizeGatheredRows().apply(graph)
    after = constants(graph)
    assert after.keys() == before.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


ZERO = [("s>", "s, int8[40] o>"), ("(q, s)", "(q, s, o)")]


@pytest.mark.parametrize(("value", "rewritten"), [(0, 1), (3, 0)])
def test_zero_points(value, rewritten):
    graph = graph_of(ROWS, *ZERO, o=np.full(40, value, np.int8))
    if rewritten:
        check_bits(graph)
        assert "o" not in graph.tensors()
    else:
        assert only_refusal(graph) == "the zero point 'o' is not 0"


def only_refusal(graph):
    result = DequantizeGatheredRows().apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    return result.refusals[0].reason


GIVEN = [("ids) =>", "ids, int8[40,48] q) =>"), ("<int8[40,48] q, ", "<")]
COMPUTED = [("(q, s)", "(q, r)"), ("  t =", "  r = Abs(s)\n  t =")]
MATRIX = [("[S] ids", "[S,2] ids"), ("[S,48] y", "[S,2,48] y")]


def block_of(size):
    return [("block_size=16", f"block_size={size}"), ("[40,3] s", f"[40,{-(-48 // size)}] s")]


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        (ROWS, GIVEN, "the weight 'q' is an input of the graph"),
        (ROWS, COMPUTED, "the weight 'r' is computed by Abs"),
        (ROWS, [("(t, ids)", "<axis=1>(t, ids)"), ("[S,48] y", "[40,S] y")], "are no rows of"),
        (ROWS, [("axis=0", "axis=1"), ("[40] s", "[48] s")], "'q' has no scale for each row"),
        (ROWS, [("[40] s", " s")], "'q' has no scale for each row"),
        (ROWS, MATRIX, "the ids 'ids' are no vector"),
        (ROWS.replace("int8", "int4"), [], "'q' is int4 without blocks"),
        (BLOCKS, [("axis=1", "axis=0"), ("[40,3]", "[3,48]")], "reach over more than one row"),
        (BLOCKS, block_of(8), "'q' has blocks of 8, no power of two from 16"),
        (BLOCKS, block_of(24), "'q' has blocks of 24, no power of two from 16"),
    ],
    ids=[
        "given", "computed", "columns", "by-column", "one-scale", "matrix", "int4-rows",
        "tall-blocks", "small", "odd",
    ],
)  # fmt: skip
def test_refusals(text, changes, reason):
    assert reason in only_refusal(graph_of(text, *changes))


def test_codes_without_sign():
    graph = graph_of(ROWS)
    codes = np.ones((40, 48), np.uint8)
    bind_weight(graph, "q", DeferredValues(codes.shape, codes.dtype, lambda: codes))
    assert only_refusal(graph) == "the table 'q' is uint8, not int8 or int4"


def test_blocks_take_ids_of_any_shape():
    for text in (BLOCKS, BYTES_IN_BLOCKS):
        check_bits(graph_of(text, *MATRIX))


def test_a_table_that_another_reads_whole():
    """A tied head: its product needs all of it still, and the rows are right either way."""
    changes = [
        ("(float[S,48] y)", "(float[S,48] y, float[40,48] z)"),
        ("  y =", "  z = Neg(t)\n  y ="),
    ]
    check_bits(graph_of(ROWS, *changes))


def test_another_operator_between_is_no_match():
    graph = graph_of(ROWS, ("y = Gather(t,", "n = Neg(t)\n  y = Gather(n,"))
    assert DequantizeGatheredRows().apply(graph).matched == 0


@settings(deadline=None, max_examples=25)
@given(
    text=st.sampled_from([ROWS, BLOCKS, BYTES_IN_BLOCKS]),
    rows=st.integers(1, 60),
    blocks=st.integers(1, 5),
    size=st.sampled_from([16, 32, 64, 256]),
    tokens=st.integers(0, 5),
    seed=st.integers(0, 100),
)
def test_any_size(text, rows, blocks, size, tokens, seed):
    text = text.replace("48", str(blocks * size)).replace("40,3]", f"40,{blocks}]")
    text = text.replace("40", str(rows)).replace("block_size=16", f"block_size={size}")
    check_bits(graph_of(text, seed=seed), {"S": tokens}, ids=rows)
