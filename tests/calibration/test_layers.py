"""What can be quantized in a graph, by which name."""

import numpy as np
import pytest

from mvlm_export.calibration.layers import find_layers, layer_name
from mvlm_export.engines.errors import PassError
from tests.passes.graphs import parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
TEXT = (
    HEAD
    + """
g (float[S,4] x, int64[S] ids) => (float[S,6] y) <float[9,4] table, float[4,6] w> {
  e = Gather(table, ids)
  s = Add(x, e)
  y = MatMul(s, w)
}
"""
)
CONV = (
    HEAD
    + """
g (float[B,3,8,8] x) => (float[B,4,4,4] y) <float[4,3,2,2] w, float[4] b> {
  y = Conv<strides = [2, 2]>(x, w, b)
}
"""
)
ATTENTION = (
    HEAD
    + """
g (float[H,S,4] q, float[H,4,S] k, float[H,S,4] v) => (float[H,S,4] y) {
  [scores] s = MatMul(q, k)
  p = Softmax(s)
  y = MatMul(p, v)
}
"""
)


def weight(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def renamed(graph, **names):
    for old, new in names.items():
        graph.tensors()[old].name = new
    return graph


def kinds(graph):
    return {layer.name: layer.kind for layer in find_layers(graph)}


def product(table="model.embed_tokens.weight", matrix="model.layers.0.mlp.up_proj.weight"):
    return renamed(
        parse_graph(TEXT, table=weight(9, 4), w=weight(4, 6)), table=table, w=matrix
    )


def test_products_and_tables():
    found = find_layers(product())
    assert [(layer.name, layer.kind) for layer in found] == [
        ("model.embed_tokens", "embedding"),
        ("model.layers.0.mlp.up_proj", "linear"),
    ]
    table, up = found
    assert table.inputs == []
    assert table.weight is table.node.inputs[0]
    assert [tensor.name for tensor in up.inputs] == ["s"]
    assert up.weight is up.node.inputs[1]


def test_a_table_of_positions_is_left_alone():
    assert kinds(product(table="rotary.cos")) == {"model.layers.0.mlp.up_proj": "linear"}


def test_convolutions():
    (layer,) = find_layers(parse_graph(CONV, w=weight(4, 3, 2, 2), b=weight(4)))
    assert (layer.name, layer.kind) == ("w", "conv")
    assert [tensor.name for tensor in layer.inputs] == ["x"]


def test_both_products_of_attention():
    graph = parse_graph(ATTENTION)
    graph.nodes[0].name, graph.nodes[2].name = "scores", ""
    assert kinds(graph) == {"scores": "attention", "y": "attention"}
    assert [layer.weight for layer in find_layers(graph)] == [None, None]
    assert [t.name for t in find_layers(graph)[1].inputs] == ["p", "v"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = MatMul(s, w)\n  z = Neg(w)", "float[S,6] y, float[4,6] z"),
        ("y = MatMul(s, w)", "float[S,6] y, float[4,6] w"),
        ("i = Identity(w)\n  y = MatMul(s, i)", "float[S,6] y"),
    ],
    ids=["shared", "output", "computed"],
)
def test_weights_that_are_not_of_one_node_alone(body, outputs):
    text = TEXT.replace("y = MatMul(s, w)", body).replace("float[S,6] y", outputs)
    graph = parse_graph(text, table=weight(9, 4), w=weight(4, 6))
    assert kinds(graph) == {}


def test_two_matrices_are_no_attention():
    text = HEAD + "g (float[S,4] x, float[4,T] k) => (float[S,T] y) { y = MatMul(x, k) }"
    assert find_layers(parse_graph(text)) == []


def test_a_constant_on_the_left_is_no_layer():
    text = HEAD + "g (float[B,4,S] x) => (float[B,2,S] y) <float[2,4] w> { y = MatMul(w, x) }"
    assert find_layers(parse_graph(text, w=weight(2, 4))) == []


def test_names_are_those_of_the_checkpoint():
    assert layer_name("model.layers.3.mlp.gate_proj.weight.with_up") == (
        "model.layers.3.mlp.gate_proj"
    )
    assert layer_name("lm_head.weight.with_norm.smoothed") == "lm_head"


def test_two_layers_of_one_name_are_refused():
    text = TEXT.replace("y = MatMul(s, w)", "z = MatMul(s, v)\n  y = MatMul(z, w)")
    text = text.replace("<float[9,4] table", "<float[4,4] v, float[9,4] table")
    graph = parse_graph(text, table=weight(9, 4), v=weight(4, 4), w=weight(4, 6))
    assert len(find_layers(graph)) == 2
    renamed(graph, v="a.weight.one", w="a.weight.two")
    with pytest.raises(PassError, match=r"MatMul .* and MatMul .* are both the layer 'a'"):
        find_layers(graph)
