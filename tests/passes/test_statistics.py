"""Figures of a graph against arithmetic done by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.deferred import DeferredValues
from mvlm_export.passes.graph_io import save_graph
from mvlm_export.passes.statistics import file_statistics, graph_statistics, model_statistics
from tests.passes.counted import UNKNOWN_AXIS, W, one_node, quantized_layers
from tests.passes.graphs import nano_config, nano_graph, parse_graph

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


def test_a_constant_without_an_output_is_one_message():
    node = helper.make_node("Relu", ["x"], ["y"])
    model = one_node(node, [("x", [1])], None)
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0])
    model.graph.node.append(helper.make_node("Constant", [], [], value=value))
    with pytest.raises(PassError, match="cannot be inferred"):
        model_statistics(model, {})


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
