"""Graphs in pieces: the same numbers, and no more kept than is read."""

import pytest

from mvlm_export.calibration.graph_pieces import GraphPieces
from mvlm_export.calibration.layers import find_layers
from mvlm_export.engines.errors import PassError
from tests.passes.graphs import assert_close, run_graph

from .toy_graphs import VOCABULARY, WIDTH, toy_decoder, toy_feeds


def pieces_of(graph, output="logits"):
    cuts = [layer.node for layer in find_layers(graph)]
    return GraphPieces(graph, cuts, graph.tensors()[output], threads=1)


def test_pieces_together_are_the_graph():
    graph, pieces = toy_decoder(), pieces_of(toy_decoder())
    assert len(pieces) == 7
    for feed in toy_feeds():
        state = dict(feed)
        for index in range(len(pieces)):
            state = pieces.open(index).run(state)
        assert list(state) == ["logits"]
        assert_close(state["logits"], run_graph(graph, feed)["logits"])


def test_a_state_is_what_is_read_later():
    pieces, state = pieces_of(toy_decoder()), dict(toy_feeds(1)[0])
    names = []
    for index in range(3):
        state = pieces.open(index).run(state)
        names.append(set(state))
    assert names == [{"h0", "shift"}, {"h0", "b0", "shift"}, {"h0", "e0", "shift"}]


def test_extra_tensors_are_the_inputs_of_the_last_node():
    pieces, feed = pieces_of(toy_decoder()), toy_feeds(1)[0]
    first, second = pieces.open(0), pieces.open(1)
    state = second.run(first.run(feed), extra=True)
    assert set(state) == {"h0", "a0", "b0", "shift"}
    assert set(second.forget(state)) == {"h0", "b0", "shift"}


def test_a_replaced_tensor_is_seen_by_what_lies_behind():
    graph, feed = toy_decoder(), toy_feeds(1)[0]
    pieces = pieces_of(graph)
    state = dict(feed)
    for index in range(len(pieces)):
        state = pieces.open(index).run(state)
        if index == 2:
            state["e0"] = state["e0"] * 0
    assert abs(state["logits"] - run_graph(graph, feed)["logits"]).max() > 1e-3


def test_nodes_that_the_output_does_not_need_are_left_out():
    graph = toy_decoder()
    with pytest.raises(PassError, match="does not need"):
        pieces_of(graph, "h1")


def test_cuts_must_be_in_order():
    graph = toy_decoder()
    cuts = [layer.node for layer in find_layers(graph)][::-1]
    with pytest.raises(PassError, match="order"):
        GraphPieces(graph, cuts, graph.tensors()["logits"])


def test_weights_are_counted():
    pieces = pieces_of(toy_decoder())
    sizes = [pieces.weight_bytes(index) for index in range(len(pieces))]
    expected = [VOCABULARY * WIDTH, *[WIDTH * 128] * 4, WIDTH * VOCABULARY, 0]
    assert sizes == [4 * count for count in expected]
