"""8-bit products in ONNX Runtime's one operator, with weights of 7 bits."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.passes.deferred import values_of
from mvlm_export.passes.graph_io import to_model
from mvlm_export.passes.lowering.use_integer_matmul import LARGEST, UseIntegerMatMul
from mvlm_export.passes.macs import count_macs
from tests.passes.graphs import assert_close, assert_same_structure, parse_graph, run_graph

BEFORE = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,S,8] x) => (float[B,S,4] y)
  <float step = {0.03}, int8 zero = {0}, int8[8,4] w, float[4] t, int8[4] z = {0, 0, 0, 0},
   float[4] bias> {
  codes = QuantizeLinear(x, step, zero)
  rounded = DequantizeLinear(codes, step, zero)
  weight = DequantizeLinear<axis=1>(w, t, z)
  product = MatMul(rounded, weight)
  y = Add(product, bias)
}
"""
EXPECTED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[B,S,8] x) => (float[B,S,4] y)
  <float step = {0.03}, uint8 zero = {128}, int8[8,4] w, float[4] t, int8[4] z = {0, 0, 0, 0},
   float[4] bias> {
  codes = QuantizeLinear(x, step, zero)
  y = com.microsoft.MatMulIntegerToFloat(codes, w, step, t, zero, z, bias)
}
"""


def weights(rows=8, columns=4, seed=0):
    generator = np.random.default_rng(seed)
    codes = generator.integers(-127, 128, (rows, columns), dtype=np.int8)
    codes[0] = 127
    scales = generator.uniform(0.001, 0.01, columns).astype(np.float32)
    return {"w": codes, "t": scales, "bias": generator.standard_normal(columns, np.float32)}


def graph_of(*changes, text=BEFORE, **values):
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    given = {**weights(), **values}
    return parse_graph(text, **{name: v for name, v in given.items() if name in text})


def pixels(rows=5, columns=8, seed=1):
    generator = np.random.default_rng(seed)
    return {"x": (2 * generator.standard_normal((2, rows, columns))).astype(np.float32)}


def expected_of(x, w, t, bias=0.0, step=0.03):
    """In float64: int8 activations, and weights rounded to -64 to 64."""
    codes = np.clip(np.rint(x / np.float32(step)), -128, 127)
    narrow = np.clip(np.rint(w.astype(np.float32) * np.float32(64 / 127)), -64, 64)
    exact = (codes @ narrow) * (np.float64(np.float32(step)) * t * (127 / 64))
    return (exact + bias).astype(np.float32)


def test_before_and_expected():
    graph = graph_of()
    result = UseIntegerMatMul().apply(graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, graph_of(text=EXPECTED))
    onnx.checker.check_model(to_model(graph), full_check=True)
    feeds = pixels()
    assert_close(run_graph(graph, feeds)["y"], expected_of(feeds["x"], **weights()))
    assert UseIntegerMatMul().apply(graph).matched == 0


def test_near_the_eight_bit_form():
    """Rounding to half as many codes moves a product by about 0.3 % of its size."""
    graph, feeds = graph_of(), pixels()
    before = run_graph(graph, feeds)["y"] - weights()["bias"]
    UseIntegerMatMul().apply(graph)
    change = run_graph(graph, feeds)["y"] - weights()["bias"] - before
    assert 0 < np.linalg.norm(change) / np.linalg.norm(before) < 0.01


def test_its_work_is_counted():
    graph = graph_of()
    UseIntegerMatMul().apply(graph)
    count = count_macs(to_model(graph), {"B": 2, "S": 5})
    assert (count.total, count.uncounted) == (2 * 5 * 8 * 4, ())


def test_without_a_bias():
    graph = graph_of(
        ("product = MatMul", "y = MatMul"),
        ("  y = Add(product, bias)\n", ""),
        (",\n   float[4] bias", ""),
    )
    assert UseIntegerMatMul().apply(graph).rewritten == 1
    (node,) = (n for n in graph.nodes if n.op == "MatMulIntegerToFloat")
    assert len(node.inputs) == 6
    feeds, given = pixels(), weights()
    del given["bias"]
    assert_close(run_graph(graph, feeds)["y"], expected_of(feeds["x"], **given))


def test_a_product_that_is_an_output_keeps_its_name_and_its_bias_behind():
    graph = graph_of(("(float[B,S,4] y)", "(float[B,S,4] y, float[B,S,4] product)"))
    assert UseIntegerMatMul().apply(graph).rewritten == 1
    assert [tensor.name for tensor in graph.outputs] == ["y", "product"]
    assert [node.op for node in graph.nodes][-1] == "Add"


def test_two_products_share_their_codes():
    both = (
        "y = Add(product, bias)",
        "other = MatMul(rounded, weight2)\n  y = Add(product, other)",
    )
    second = (
        "product = MatMul(rounded, weight)",
        "weight2 = DequantizeLinear<axis=1>(w2, t2)\n  product = MatMul(rounded, weight)",
    )
    named = ("float[4] bias>", "int8[8,4] w2, float[4] t2>")
    graph = graph_of(both, second, named, w2=weights(seed=3)["w"], t2=weights(seed=3)["t"])
    assert UseIntegerMatMul().apply(graph).rewritten == 2
    assert [n.op for n in graph.nodes].count("QuantizeLinear") == 1


def test_no_pair_of_products_leaves_16_bits():
    """The worst case: every code 255, every weight at its largest."""
    large = np.full((8, 4), 127, np.int8)
    graph = graph_of(w=large)
    UseIntegerMatMul().apply(graph)
    (node,) = (n for n in graph.nodes if n.op == "MatMulIntegerToFloat")
    assert np.abs(values_of(node.inputs[1]).astype(int)).max() == LARGEST
    assert 2 * 255 * LARGEST < 2**15
    feeds = {"x": np.full((1, 6, 8), 100, np.float32)}
    found = onnxruntime.InferenceSession(to_model(graph).SerializeToString()).run(None, feeds)[
        0
    ]
    given = {**weights(), "w": large}
    assert_close(found, expected_of(feeds["x"], **given))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ([("int8 zero = {0}", "int8 zero = {3}")], "'zero' is not 0 of int8"),
        (
            [("float step = {0.03}", "float[8] step = {1, 1, 1, 1, 1, 1, 1, 1}"),
             ("int8 zero = {0}", "int8[8] zero = {0, 0, 0, 0, 0, 0, 0, 0}"),
             ("QuantizeLinear(x", "QuantizeLinear<axis=2>(x"),
             ("DequantizeLinear(codes", "DequantizeLinear<axis=2>(codes")],
            "'step' is not one constant number",
        ),
        ([("z = {0, 0, 0, 0}", "z = {0, 0, 9, 0}")], "the zero point 'z' is not 0"),
        (
            [("y = Add(product, bias)", "s = Add(product, bias)\n"
              "  most = ReduceMax<keepdims=0>(weight, first)\n  y = Add(s, most)"),
             ("float[4] bias>", "float[4] bias, int64[1] first = {0}>")],
            "'weight' is also read elsewhere",
        ),
    ],
    ids=["zero point", "channels", "weight offsets", "shared weight"],
)  # fmt: skip
def test_refusals(changes, reason):
    result = UseIntegerMatMul().apply(graph_of(*changes))
    assert result.rewritten == 0
    assert reason in result.refusals[0].reason


def test_scales_of_rows_are_refused():
    offsets = ("int8[4] z = {0, 0, 0, 0}", "int8[8] z = {0, 0, 0, 0, 0, 0, 0, 0}")
    by_row = ("axis=1", "axis=0"), ("float[4] t", "float[8] t"), offsets
    (refusal,) = UseIntegerMatMul().apply(graph_of(*by_row, t=np.ones(8, np.float32))).refusals
    assert refusal.reason == "'t' has no scale for each column of 'w'"


def test_a_float_weight_is_no_match():
    graph = graph_of(
        (
            "weight = DequantizeLinear<axis=1>(w, t, z)",
            "c = Cast<to=1>(w)\n  weight = Mul(c, t)",
        )
    )
    assert UseIntegerMatMul().apply(graph).matched == 0


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 70), depth=st.integers(1, 40), columns=st.integers(1, 40),
    seed=st.integers(0, 50),
)  # fmt: skip
def test_any_size(rows, depth, columns, seed):
    text = BEFORE.replace("S,8]", f"S,{depth}]").replace("S,4]", f"S,{columns}]")
    text = text.replace("[8,4]", f"[{depth},{columns}]").replace("[4]", f"[{columns}]")
    text = text.replace("{0, 0, 0, 0}", "{" + ", ".join(["0"] * columns) + "}")
    given = weights(depth, columns, seed)
    graph, feeds = graph_of(text=text, **given), pixels(rows, depth, seed)
    assert UseIntegerMatMul().apply(graph).rewritten == 1
    expected = expected_of(feeds["x"], **given)
    assert_close(run_graph(graph, feeds)["y"], expected)
