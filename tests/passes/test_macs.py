"""Multiply-accumulates against arithmetic done by hand."""

import math

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.macs import count_macs
from tests.passes.counted import (
    UNKNOWN_AXIS,
    one_node,
    quantized_layers,
    statistics_of,
    total,
)


@given(
    batch=st.lists(st.integers(1, 4), max_size=2),
    m=st.integers(1, 9),
    k=st.integers(1, 9),
    n=st.integers(1, 9),
)
def test_matmul(batch, m, k, n):
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = one_node(node, [("a", [*batch, m, k]), ("b", [k, n])], None)
    assert total(model) == math.prod(batch) * m * k * n


@pytest.mark.parametrize(
    ("a", "b", "expected"), [([5], [5, 7], 35), ([3, 5], [5], 15), ([5], [5], 5)]
)
def test_matmul_of_vectors(a, b, expected):
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    assert total(one_node(node, [("a", a), ("b", b)], None)) == expected


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(trans_a, trans_b):
    a, b = ([7, 3] if trans_a else [3, 7]), ([5, 7] if trans_b else [7, 5])
    node = helper.make_node("Gemm", ["a", "b"], ["y"], transA=trans_a, transB=trans_b)
    assert total(one_node(node, [("a", a), ("b", b)], None)) == 3 * 7 * 5


def taps(groups, channels, outputs, kernel, size, stride):
    """Products of a convolution without padding, one by one."""
    places = len(range(0, size - kernel + 1, stride)) ** 2
    return sum(channels // groups * kernel**2 * places for _ in range(outputs))


@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    size=st.integers(3, 7),
)
def test_conv(groups, per_group, kernel, stride, size):
    channels = groups * per_group
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=groups, strides=[stride] * 2)
    weight = [2 * groups, per_group, kernel, kernel]
    model = one_node(node, [("x", [1, channels, size, size]), ("w", weight)], None)
    assert total(model) == taps(groups, channels, 2 * groups, kernel, size, stride)


def test_conv_transpose_counts_what_each_input_is_spread_to():
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    model = one_node(node, [("x", [1, 3, 4, 4]), ("w", [3, 5, 2, 2])], None)
    assert total(model) == 3 * 4 * 4 * 5 * 2 * 2


def test_attention_equals_its_two_products():
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    shapes = [("q", [2, 8, 3, 16]), ("k", [2, 2, 10, 16]), ("v", [2, 2, 10, 32])]
    products = 2 * 8 * (3 * 16 * 10 + 3 * 10 * 32)
    assert total(one_node(node, shapes, None)) == products


def test_attention_of_three_axes_with_a_past():
    inputs = ["q", "k", "v", "", "past_k", "past_v"]
    node = helper.make_node("Attention", inputs, ["y"], q_num_heads=4, kv_num_heads=2)
    shapes = [
        ("q", [1, "S", 4 * 8]),
        ("k", [1, "S", 2 * 8]),
        ("v", [1, "S", 2 * 8]),
        ("past_k", [1, 2, "T", 8]),
        ("past_v", [1, 2, "T", 8]),
    ]
    assert total(one_node(node, shapes, None), S=3, T=7) == 2 * 4 * 3 * (7 + 3) * 8


@pytest.mark.parametrize("packed", [False, True])
def test_group_query_attention(packed):
    width = (8 + 2 * 2) * 16 if packed else 8 * 16
    keys = ["", ""] if packed else ["k", "v"]
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", *keys, "past_k", "past_v", "lengths", "longest"],
        ["y"],
        domain="com.microsoft",
        num_heads=8,
        kv_num_heads=2,
    )
    shapes = [
        ("q", [1, "S", width]),
        *(() if packed else (("k", [1, "S", 32]), ("v", [1, "S", 32]))),
        ("past_k", [1, 2, "T", 16]),
        ("past_v", [1, 2, "T", 16]),
        ("lengths", [1]),
        ("longest", []),
    ]
    model = one_node(node, shapes, [1, "S", 128], domains=["com.microsoft"])
    assert total(model, S=1, T=99) == 2 * 8 * 100 * 16


def test_a_fixed_cache_counts_its_filled_rows():
    """As the append form does: T rows and the new ones, whatever the capacity."""
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "past_k", "past_v", "past_length", "longest"],
        ["y"],
        domain="com.microsoft",
        num_heads=8,
        kv_num_heads=2,
    )
    shapes = [
        ("q", [1, "S", 128]),
        ("k", [1, "S", 32]),
        ("v", [1, "S", 32]),
        ("past_k", [1, 2, 512, 16]),
        ("past_v", [1, 2, 512, 16]),
        ("past_length", [1]),
        ("longest", []),
    ]
    model = one_node(node, shapes, [1, "S", 128], domains=["com.microsoft"])
    assert total(model, S=4, T=99) == 2 * 8 * 4 * 103 * 16
    assert total(model, S=4) == 2 * 8 * 4 * 516 * 16
    assert count_macs(model, {"S": 4, "T": 99}).axes == {"S": 4, "T": 99}


def test_shapes_go_through_operators_that_onnx_does_not_know():
    count = count_macs(quantized_layers(), {"B": 2})
    assert count.uncounted == ()
    assert count.by_operator == {
        "com.microsoft.MatMulNBits": 2 * 5 * (64 * 32 + 32 * 16),
        "MatMul": 2 * 5 * 16 * 3,
    }


def test_an_axis_without_a_value_is_said_and_is_no_zero():
    count = statistics_of(UNKNOWN_AXIS).macs
    assert (count.total, count.by_operator) == (0, {})
    (missing,) = count.uncounted
    assert missing.operator == "MatMul"
    assert missing.reason == "axis 'S' of 'y' has no value"


def test_an_axis_of_size_zero_counts_as_zero():
    assert statistics_of(UNKNOWN_AXIS, S=0).macs.uncounted == ()


def test_a_negative_axis_says_nothing():
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    count = count_macs(one_node(node, [("x", [-1, 4, 4])], [-1, 4, 4]), {})
    assert count.total == 0
    assert "has no value" in count.uncounted[0].reason


@pytest.mark.parametrize(
    ("operator", "domain", "reason"),
    [
        ("Mystery", "acme", "is not one of ONNX (domain 'acme')"),
        ("LSTM", "", "no rule for this operator"),
        ("MatMul", "acme", "is not one of ONNX (domain 'acme')"),
    ],
)
def test_an_operator_without_a_rule_is_said(operator, domain, reason):
    node = helper.make_node(operator, ["x", "w", "r"], ["y"], "odd", domain=domain)
    shapes = [("x", [1, 2, 3]), ("w", [1, 4, 3]), ("r", [1, 4, 1])]
    (missing,) = count_macs(one_node(node, shapes, None, domains=["acme"]), {}).uncounted
    assert (missing.node, reason in missing.reason) == ("odd", True)


def test_a_nested_graph_is_said():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (bool c, float[2,2] x) => (float[2,2] y) {
      y = If(c) <then_branch = t () => (float[2,2] p) { p = MatMul(x, x) },
                 else_branch = e () => (float[2,2] q) { q = Identity(x) }>
    }
    """
    (missing,) = count_macs(onnx.parser.parse_model(text), {}).uncounted
    assert missing.reason == "it runs a graph of its own"


def test_a_recorded_shape_helps_where_inference_gives_up():
    """A reshape to sizes that a graph input holds: only the record knows."""
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[S,T,4] x, int64[2] sizes, float[4,2] w) => (float[R,2] y)
    { r = Reshape(x, sizes)  y = MatMul(r, w) }
    """)
    axes = {"S": 2, "T": 3}
    assert len(count_macs(model, axes).uncounted) == 1
    recorded = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["T + S", 4])
    model.graph.value_info.append(recorded)
    assert total(model, **axes) == (2 + 3) * 4 * 2


def test_a_recorded_shape_that_is_wrong_does_not_hide_the_inferred_one():
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[S,4] x, float[4,2] w) => (float[S,2] y) { r = Relu(x)  y = MatMul(r, w) }
    """)
    recorded = helper.make_tensor_value_info("r", TensorProto.FLOAT, ["9*S", 4])
    model.graph.value_info.append(recorded)
    assert total(model, S=3) == 3 * 4 * 2


def test_a_graph_that_does_not_fit_together_is_refused_or_said():
    """Operands of other sizes: no figure comes out of it."""
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = one_node(node, [("a", [2, 3]), ("b", [4, 5])], None)
    (missing,) = count_macs(model, {}).uncounted
    assert "shape of 'y' is not known" in missing.reason
    del model.opset_import[:]
    with pytest.raises(PassError, match="cannot be inferred"):
        count_macs(model, {})
