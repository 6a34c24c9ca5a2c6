"""What no output depends on is dropped."""

import numpy as np
import pytest

from mvlm_export.passes.general.remove_dead_code import RemoveDeadCode
from tests.passes.graphs import assert_same_structure, check_pass, nano_graph, parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
BEFORE = (
    HEAD
    + """
g (float[B,4] x) => (float[B,2] y) {
  first, second = Split<axis=1, num_outputs=2>(x)
  a = Mul(x, u)
  b = Relu(a)
  y = Neg(first)
}
"""
)
EXPECTED = (
    HEAD
    + """
g (float[B,4] x) => (float[B,2] y) {
  first, second = Split<axis=1, num_outputs=2>(x)
  y = Neg(first)
}
"""
)


U = np.arange(4, dtype=np.float32)


def test_before_and_expected():
    graph = parse_graph(BEFORE, u=U)
    result = check_pass(RemoveDeadCode(), graph)
    assert (result.matched, result.rewritten) == (2, 2)
    assert_same_structure(graph, parse_graph(EXPECTED))


def test_weights_go_with_their_readers():
    graph = parse_graph(BEFORE, u=U)
    RemoveDeadCode().apply(graph)
    assert "u" not in graph.tensors()


def test_unread_outputs_of_a_living_node_stay():
    graph = parse_graph(BEFORE, u=U)
    RemoveDeadCode().apply(graph)
    assert [tensor.name for tensor in graph.nodes[0].outputs] == ["first", "second"]


def test_inputs_of_the_graph_stay_even_unread():
    text = "g (float[B] x, float[B] z) => (float[B] y) { d = Neg(z)\n y = Abs(x) }"
    graph = parse_graph(HEAD + text)
    assert RemoveDeadCode().apply(graph).rewritten == 1
    assert [tensor.name for tensor in graph.inputs] == ["x", "z"]


def test_what_only_a_subgraph_reads_is_alive():
    text = """g (float[B] x, bool c) => (float[B] y) {
      n = Neg(x)
      y = If (c) <
        then_branch = t () => (float[B] r) { r = Abs(n) },
        else_branch = e () => (float[B] s) { s = Identity(n) }
      > }"""
    graph = parse_graph(HEAD + text)
    assert RemoveDeadCode().run(graph).rewritten == 0


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_captured_graphs_have_none(name):
    assert RemoveDeadCode().apply(nano_graph(name)).matched == 0


def test_a_decoder_without_its_logits():
    graph = nano_graph("decoder")
    graph.outputs = [tensor for tensor in graph.outputs if tensor.name == "present.0.key"]
    result = RemoveDeadCode().apply(graph)
    assert result.rewritten > 150
    assert "lm_head.weight" not in graph.tensors()
    assert "model.layers.0.self_attn.k_proj.weight" in graph.tensors()
