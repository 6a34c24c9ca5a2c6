"""Counts against arithmetic done by hand, and against what a run really does."""

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.bound_shapes import bound_shapes, evaluate_axis
from mvlm_export.passes.comparison import compare
from mvlm_export.passes.deferred import DeferredValues
from mvlm_export.passes.graph_io import save_graph, to_model
from mvlm_export.passes.macs import count_macs
from mvlm_export.passes.statistics import file_statistics, graph_statistics, model_statistics
from tests.passes.graphs import nano_config, nano_graph, parse_graph, random_feeds, run_graph

DECODE = {"S": 1, "T": 100, "I": 1}


@pytest.mark.parametrize(
    ("nodes", "cycle"),
    [
        ([("Add", "y a", "y")], "Add 'y' → Add 'y'"),
        ([("Add", "y a", "z"), ("Relu", "z", "y")], "Relu 'y'"),
        ([("Relu", "a", "b"), ("Add", "b z", "y"), ("Neg", "y", "z")], "Neg 'z'"),
    ],
)
def test_a_cycle_is_refused(tmp_path, nodes, cycle):
    made = [helper.make_node(op, read.split(), [write]) for op, read, write in nodes]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "ay"]
    graph = helper.make_graph(made, "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), tmp_path / "cycle.onnx")
    with pytest.raises(PassError, match="its nodes make a cycle") as caught:
        file_statistics(tmp_path / "cycle.onnx", {})
    assert cycle in str(caught.value)


@pytest.mark.parametrize("text", [b"Sigmoid", b"inner_x", b"axis_S"])
def test_text_that_is_not_utf_8_is_refused(tmp_path, text):
    node = helper.make_node("Sigmoid", ["inner_x"], ["y"])
    data = one_node(node, [("inner_x", ["axis_S"])], None).SerializeToString()
    (tmp_path / "bad.onnx").write_bytes(data.replace(text, b"\xff" + text[1:]))
    with pytest.raises(PassError, match="is not UTF-8"):
        file_statistics(tmp_path / "bad.onnx", {})


@pytest.mark.parametrize("dims", [[-4, 3], [2**40, 2**40]])
def test_a_weight_of_an_impossible_shape_is_refused(dims):
    node = helper.make_node("Identity", ["w"], ["y"])
    model = one_node(node, [("x", [1])], None)
    weight = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT)
    weight.dims.extend(dims)
    with pytest.raises(PassError, match=r"weight 'w' cannot have the shape"):
        model_statistics(model, {})


@given(size=st.integers(1, 2**31 - 1), rank=st.integers(1, 5))
def test_shapes_are_right_or_refused(size, rank):
    """ONNX multiplies in 64 bits and would go on with a wrong number."""
    node = helper.make_node("Reshape", ["x", "to"], ["y"])
    model = one_node(node, [("x", ["S"] * rank)], None)
    model.graph.initializer.append(helper.make_tensor("to", TensorProto.INT64, [1], [-1]))
    if size**rank < 2**63:
        assert bound_shapes(model, {"S": size})["y"] == (size**rank,)
    else:
        with pytest.raises(PassError, match=rf"'x' of g has more than .* for S={size}\."):
            bound_shapes(model, {"S": size})


def test_a_negative_axis_says_nothing():
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    count = count_macs(one_node(node, [("x", [-1, 4, 4])], [-1, 4, 4]), {})
    assert count.total == 0
    assert "has no value" in count.uncounted[0].reason


def test_a_constant_without_an_output_is_one_message():
    node = helper.make_node("Relu", ["x"], ["y"])
    model = one_node(node, [("x", [1])], None)
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0])
    model.graph.node.append(helper.make_node("Constant", [], [], value=value))
    with pytest.raises(PassError, match="cannot be inferred"):
        model_statistics(model, {})


W = np.zeros((4, 2), np.float32)


def statistics_of(text, **axes):
    return graph_statistics(parse_graph(text, w=W), axes)


def one_node(node, inputs, output, opset=23, domains=()):
    """A model of one node; all operands are inputs."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs
    ]
    result = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, output)
    graph = helper.make_graph([node], "g", values, [result])
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets)


def total(model, **axes):
    count = count_macs(model, axes)
    assert count.uncounted == ()
    return count.total


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


def quantized_layers():
    """MatMulNBits [.., 64] -> [.., 32] -> [.., 16], then a MatMul that needs their shapes."""

    def layer(source, target, k, n):
        return helper.make_node(
            "MatMulNBits",
            [source, f"{target}.q", f"{target}.s"],
            [target],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=32,
        )

    nodes = [
        layer("x", "a", 64, 32),
        layer("a", "b", 32, 16),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    initializers = [
        helper.make_tensor(name, kind, shape, bytes(math.prod(shape) * size), raw=True)
        for name, kind, shape, size in (
            ("a.q", TensorProto.UINT8, [32, 2, 16], 1),
            ("b.q", TensorProto.UINT8, [16, 1, 16], 1),
            ("a.s", TensorProto.FLOAT, [32, 2], 4),
            ("b.s", TensorProto.FLOAT, [16, 1], 4),
            ("w", TensorProto.FLOAT, [16, 3], 4),
        )
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 5, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def test_shapes_go_through_operators_that_onnx_does_not_know():
    count = count_macs(quantized_layers(), {"B": 2})
    assert count.uncounted == ()
    assert count.by_operator == {
        "com.microsoft.MatMulNBits": 2 * 5 * (64 * 32 + 32 * 16),
        "MatMul": 2 * 5 * 16 * 3,
    }


UNKNOWN_AXIS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,4] x) => (float[S,2] y) <float[4,2] w> { y = MatMul(x, w) }
"""


def test_an_axis_without_a_value_is_said_and_is_no_zero():
    count = statistics_of(UNKNOWN_AXIS).macs
    assert (count.total, count.by_operator) == (0, {})
    (missing,) = count.uncounted
    assert missing.operator == "MatMul"
    assert missing.reason == "axis 'S' of 'y' has no value"


def test_an_axis_of_size_zero_counts_as_zero():
    assert statistics_of(UNKNOWN_AXIS, S=0).macs.uncounted == ()


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("S", 5),
        ("T + S", 8),
        ("2*T + 1", 7),
        ("S // T", 1),
        ("S - T*T", -4),
        ("odd.name", 11),
        ("U", None),
        ("S + U", None),
        ("S // 0", None),
        ("S ** 2", None),
        ("__import__('os')", None),
        ("((", None),
        ("", None),
    ],
)
def test_axes_are_sums_and_products(text, value):
    assert evaluate_axis(text, {"S": 5, "T": 3, "odd.name": 11}) == value


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
@pytest.mark.parametrize("sizes", [{"B": 2, "S": 5, "T": 4, "I": 2}])
def test_bound_shapes_are_those_of_a_run(name, sizes):
    """Every tensor of the nano model, computed by ONNX Runtime."""
    graph = nano_graph(name)
    shapes = bound_shapes(to_model(graph), sizes)
    inner = [t for node in graph.nodes for t in node.outputs if t.name]
    known = {id(t) for t in graph.outputs}
    graph.outputs += [t for t in inner if id(t) not in known]
    found = run_graph(graph, random_feeds(graph, sizes))
    assert len(found) > 10
    assert {k: shapes[k] for k in found} == {k: v.shape for k, v in found.items()}


def test_nano_decoder_by_hand():
    text = nano_config().text
    hidden, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    projections = layers * (4 * hidden * hidden + 3 * hidden * inner)
    head = hidden * text.vocab_size
    attention = layers * 2 * hidden * (DECODE["T"] + 1)
    found = graph_statistics(nano_graph("decoder"), DECODE)
    assert found.macs.total == projections + head + attention
    assert found.macs.by_operator == {"MatMul": found.macs.total}
    assert found.axes == ("S", "I", "T")
    assert found.operators["Softmax"] == layers


def test_weights_are_not_loaded():
    def read():
        raise AssertionError("a weight was read")

    graph = parse_graph(UNKNOWN_AXIS, w=W)
    graph.tensors()["w"].values = DeferredValues((4, 2), np.float32, read)
    found = graph_statistics(graph, {"S": 3})
    assert found.macs.total == 3 * 4 * 2
    assert found.weight_bytes == 32


def test_a_file_without_its_data(tmp_path):
    graph = nano_graph("projector")
    save_graph(graph, tmp_path / "p.onnx")
    expected = graph_statistics(graph, {"B": 2})
    (tmp_path / "p.onnx.data").unlink()
    assert file_statistics(tmp_path / "p.onnx", {"B": 2}) == expected


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x0a"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(PassError, match=r"x\.onnx"):
        file_statistics(path, {})


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PassError, match="cannot be read"):
        file_statistics(tmp_path / "x.onnx", {})


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        ("FLOAT", [3, 5], 60),
        ("FLOAT16", [3, 5], 30),
        ("BFLOAT16", [3, 5], 30),
        ("INT8", [3, 5], 15),
        ("INT4", [3, 5], 8),
        ("UINT4", [4], 2),
        ("INT64", [], 8),
        ("BOOL", [3], 3),
        ("FLOAT8E4M3FN", [3], 3),
        ("DOUBLE", [0, 7], 0),
    ],
)
def test_bytes_by_dtype(kind, shape, size):
    """As onnx itself stores them."""
    tensor = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=shape)
    node = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
    model = one_node(node, [], shape)
    model.graph.initializer.append(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    assert len(onnx.numpy_helper.from_array(np.zeros(shape, dtype)).raw_data) == size
    found = model_statistics(model, {})
    assert found.weight_bytes == size
    (weight,) = found.largest
    assert (weight.name, weight.shape, weight.bytes) == ("w", tuple(shape), size)


def test_a_constant_node_counts_as_a_weight():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[S] x) => (float[S] y) { c = Constant <value = float[3] {1, 2, 3}> ()
      d = ReduceSum<keepdims=0>(c)  y = Add(x, d) }
    """
    found = model_statistics(onnx.parser.parse_model(text), {})
    assert (found.weight_count, found.weight_bytes) == (1, 12)


def test_an_initializer_among_the_inputs_is_no_input():
    model = onnx.parser.parse_model(UNKNOWN_AXIS)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))
    model.graph.initializer.append(helper.make_tensor("w", 1, [4, 2], [0.0] * 8))
    found = model_statistics(model, {"S": 3})
    assert [tensor.name for tensor in found.inputs] == ["x"]
    assert found.macs.total == 24


def test_facts_and_json():
    found = model_statistics(quantized_layers(), {"B": 2})
    assert (found.opset, found.domains, found.nodes) == (20, {"com.microsoft": 1}, 3)
    assert found.operators == {"com.microsoft.MatMulNBits": 2, "MatMul": 1}
    data = found.to_json()
    assert data["inputs"] == ({"name": "x", "dtype": "float32", "shape": ("B", 5, 64)},)
    assert data["weights"]["uint8"] == {"count": 2, "elements": 1280, "bytes": 1280}
    assert data["weight_bytes"] == sum(w["bytes"] for w in data["weights"].values())
    assert data["macs"]["axes"] == {"B": 2}


def test_comparison():
    before = statistics_of(UNKNOWN_AXIS, S=3)
    text = UNKNOWN_AXIS.replace("float[S,2] y", "float16[S,2] z").replace(
        "y = MatMul(x, w)", "y = MatMul(x, w)  r = Relu(y)  z = Cast<to=10>(r)"
    )
    graph = parse_graph(text, w=W)
    found = compare(before, graph_statistics(graph, {"S": 6}))
    assert (found.nodes.before, found.nodes.after, found.nodes.difference) == (1, 3, 2)
    assert set(found.operators) == {"Relu", "Cast"}
    assert (found.macs.before, found.macs.after, found.macs.ratio) == (24, 48, 2.0)
    assert [change.name for change in found.outputs] == ["y", "z"]
    assert found.outputs[0].after is None
    assert found.outputs[1].before is None
    assert found.inputs == ()
    data = found.to_json()
    assert data["operators"]["Relu"] == {"before": 0, "after": 1, "ratio": None}
    assert data["outputs"][1]["after"]["dtype"] == "float16"


def test_a_graph_compared_with_itself_has_no_changes():
    found = graph_statistics(nano_graph("projector"), {"B": 1})
    same = compare(found, found)
    assert not same.operators
    assert not same.macs_by_operator
    assert same.bytes.ratio == 1.0


def test_a_changed_dtype_of_an_input_is_seen():
    before = parse_graph(UNKNOWN_AXIS, w=W)
    after = before.copy()
    after.inputs = [gs.Variable("x", np.float16, ["S", 4])]
    found = compare(graph_statistics(before, {}), graph_statistics(after, {}))
    assert [change.name for change in found.inputs] == ["x"]


def test_a_graph_that_does_not_fit_together_is_refused_or_said():
    """Operands of other sizes: no figure comes out of it."""
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = one_node(node, [("a", [2, 3]), ("b", [4, 5])], None)
    (missing,) = count_macs(model, {}).uncounted
    assert "shape of 'y' is not known" in missing.reason
    del model.opset_import[:]
    with pytest.raises(PassError, match="cannot be inferred"):
        count_macs(model, {})
