"""The passes of this folder one after the other, as a pipeline runs them."""

import pytest

from mvlm_export.passes.base import Expect, PassManager, Step
from mvlm_export.passes.transformer.fold_layernorm_affine import FoldLayerNormAffine
from mvlm_export.passes.transformer.fold_query_scale import FoldQueryScale
from mvlm_export.passes.transformer.fold_rmsnorm_weight import FoldRmsNormWeight
from mvlm_export.passes.transformer.merge_gate_up import MergeGateUp
from mvlm_export.passes.transformer.merge_qkv import MergeQkv
from tests.passes.graphs import (
    assert_close,
    nano_graph,
    random_feeds,
    run_graph,
    tiny_graph,
)

SIZES = {"S": 3, "T": 4, "I": 5}


def encoder_steps(layers):
    return [
        Step(FoldLayerNormAffine(), Expect(2 * layers, "two a layer")),
        Step(FoldQueryScale(), Expect(layers, "one a layer")),
        Step(MergeQkv(), Expect(layers, "one a layer")),
        Step(MergeGateUp(), Expect(0, "there is no gate")),
    ]


def decoder_steps(layers):
    return [
        Step(FoldRmsNormWeight(), Expect(2 * layers + 1, "two a layer, and the last norm")),
        Step(FoldQueryScale(), Expect(layers, "one a layer")),
        Step(MergeQkv(), Expect(layers, "one a layer")),
        Step(MergeGateUp(), Expect(layers, "one a layer")),
    ]


def run_steps(graph, steps, **ranges):
    before = graph.copy()
    PassManager(steps).run(graph)
    feeds = random_feeds(graph, SIZES, **ranges)
    expected, found = run_graph(before, feeds), run_graph(graph, feeds)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(found[name], values)
    return [node.op for node in before.nodes], [node.op for node in graph.nodes]


def test_encoder():
    before, after = run_steps(tiny_graph("vision_encoder"), encoder_steps(2))
    # A layer: three MatMuls and their Adds become one of each; the scale goes.
    assert before.count("MatMul") - after.count("MatMul") == 2 * 2
    assert before.count("Add") - after.count("Add") == 2 * 2
    assert before.count("Mul") - after.count("Mul") == 2


@pytest.mark.parametrize("heads", [4, 2])
def test_decoder(heads):
    graph = tiny_graph("decoder", num_key_value_heads=heads)
    before, after = run_steps(graph, decoder_steps(2), input_ids=320)
    assert before.count("MatMul") - after.count("MatMul") == 2 * (2 + 1)
    assert before.count("Mul") - after.count("Mul") == 2 * (2 + 1) + 1
    assert after.count("Split") - before.count("Split") == 2 * 2


def test_nano_encoder():
    run_steps(nano_graph("vision_encoder"), encoder_steps(4))


def test_nano_decoder():
    run_steps(nano_graph("decoder"), decoder_steps(4), input_ids=512)
