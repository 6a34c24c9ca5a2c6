"""Graphs whose figures are known, and what is counted of them."""

import math

import numpy as np
from onnx import TensorProto, helper

from mvlm_export.passes.macs import count_macs
from mvlm_export.passes.statistics import graph_statistics
from tests.passes.graphs import parse_graph

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


UNKNOWN_AXIS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,4] x) => (float[S,2] y) <float[4,2] w> { y = MatMul(x, w) }
"""
