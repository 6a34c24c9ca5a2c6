"""The walk step by step is the run of the whole graph, and keeps no more than it needs."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from mvlm_export.calibration.graph_walker import GraphWalker, check_dtype, rows_of
from mvlm_export.calibration.layers import find_layers
from mvlm_export.engines.errors import EngineError, InputError, PassError
from mvlm_export.passes.deferred import DeferredValues
from mvlm_export.passes.graph_io import bind_weight
from tests.passes.graphs import assert_close, parse_graph, random_feeds

from .nano_models import calibration_samples, nano, run_exactly

RTOL = 1e-6

CHAIN = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,4] x, float[S,4] unused) => (float[S,4] y)
<float[4,4] a, float[4,4] b, float[4,4] c> {
  p = MatMul(x, a)
  q = Tanh(p)
  r = MatMul(q, b)
  l, m = Split<axis=-1, num_outputs=2>(r)
  j = Concat<axis=-1>(m, l)
  s = Add(j, x)
  y = MatMul(s, c)
}
"""


def chain(**weights):
    generator = np.random.default_rng(0)
    made = {n: generator.standard_normal((4, 4)).astype(np.float32) for n in "abc"}
    return parse_graph(CHAIN, **{**made, **weights})


def feeds_of(*lengths):
    generator = np.random.default_rng(1)
    return [
        {
            name: generator.standard_normal((n, 4)).astype(np.float32)
            for name in ("x", "unused")
        }
        for n in lengths
    ]


def at_once(graph: gs.Graph, names, feeds):
    """The named tensors from one run of the whole graph."""
    whole = graph.copy()
    whole.outputs = [whole.tensors()[name] for name in names]
    return run_exactly(whole.cleanup(), feeds)


def assert_equal_runs(graph, feeds):
    """Layer by layer, every input is what the whole graph makes of it."""
    layers = [layer for layer in find_layers(graph) if layer.inputs]
    names = [tensor.name for layer in layers for tensor in layer.inputs]
    expected = at_once(graph, dict.fromkeys(names), feeds)
    walker = GraphWalker(graph, feeds, threads=1)
    for layer in layers:
        for found, whole in zip(walker.advance(layer.inputs), expected, strict=True):
            for tensor in layer.inputs:
                assert_close(found[tensor.name], whole[tensor.name], RTOL)
    ends = [tensor for tensor in graph.outputs if not tensor.name.startswith("present")]
    for found, whole in zip(walker.advance(ends), run_exactly(graph, feeds), strict=True):
        for tensor in ends:
            assert_close(found[tensor.name], whole[tensor.name], RTOL)
    return len(layers)


@pytest.mark.parametrize(("name", "layers"), [("decoder", 25), ("vision_encoder", 25)])
def test_nano(name, layers):
    model = nano()
    feeds = model.feeds(name, calibration_samples(3))
    if name == "decoder":
        assert len({feed["input_ids"].shape for feed in feeds}) > 1
    assert assert_equal_runs(model.graph(name), feeds) == layers


def test_a_decoder_with_a_filled_cache():
    graph = nano().graph("decoder")
    feeds = [
        random_feeds(graph, {"S": rows, "T": past, "I": 4}, seed=rows, input_ids=512 + 4)
        for rows, past in ((5, 0), (1, 7), (3, 2))
    ]
    assert_equal_runs(graph, feeds)


def test_a_chain_of_every_form():
    assert assert_equal_runs(chain(), feeds_of(1, 5, 2)) == 3


def readers_left(graph, done):
    """Names of tensors that are there and that a node which did not run reads."""
    there = [*graph.inputs, *(t for node in done for t in node.outputs)]
    ran = {id(node) for node in done}
    return {t.name for t in there if any(id(node) not in ran for node in t.outputs)}


def ancestors(tensors):
    found: dict[int, gs.Node] = {}
    pending = list(tensors)
    while pending:
        for node in pending.pop().inputs:
            if id(node) not in found:
                found[id(node)] = node
                pending += node.inputs
    return list(found.values())


def test_nothing_is_kept_that_nobody_reads():
    model = nano()
    graph = model.graph("decoder")
    walker = GraphWalker(graph, model.feeds("decoder", calibration_samples(1)), threads=1)
    asked, held = [], []
    for layer in find_layers(graph):
        walker.advance(layer.inputs)
        asked += layer.inputs
        assert walker.held == readers_left(graph, ancestors(asked))
        held.append(len(walker.held))
    assert held[-1] == 1, "the last product reads one tensor"
    assert max(held) <= 8 + 8, "the caches of four layers, and what one layer needs"
    walker.advance(graph.outputs[:1])
    assert not walker.held


def test_each_weight_is_read_once_and_when_its_node_runs():
    graph, read = chain(), []
    for name in "abc":
        values = graph.tensors()[name].values

        def load(name=name, values=values):
            read.append(name)
            return values

        bind_weight(graph, name, DeferredValues((4, 4), np.float32, load))
    walker = GraphWalker(graph, feeds_of(2, 3), threads=1)
    seen = []
    for layer in find_layers(graph):
        walker.advance(layer.inputs)
        seen.append("".join(read))
    walker.advance(graph.outputs)
    assert (*seen, "".join(read)) == ("", "a", "ab", "abc")


def test_a_replaced_weight_is_seen_behind_it():
    graph, feeds = chain(), feeds_of(3)
    walker = GraphWalker(graph, feeds, threads=1)
    first, second, _ = find_layers(graph)
    walker.advance(first.inputs)
    other = np.eye(4, dtype=np.float32)
    first.node.inputs[1] = gs.Constant("other", other)
    (found,) = walker.advance(second.inputs)
    np.testing.assert_allclose(found["q"], np.tanh(feeds[0]["x"]), rtol=1e-6)
    (whole,) = at_once(chain(a=other), ["y"], feeds)
    (found,) = walker.advance(graph.outputs)
    assert_close(found["y"], whole["y"], RTOL)


def test_a_constant_is_left_out():
    graph = chain()
    walker = GraphWalker(graph, feeds_of(2), threads=1)
    tensors = graph.tensors()
    (found,) = walker.advance([tensors["a"], tensors["p"]])
    assert list(found) == ["p"]


def test_a_tensor_may_be_asked_for_while_it_is_kept():
    graph = chain()
    walker = GraphWalker(graph, feeds_of(2), threads=1)
    (first,) = walker.advance([graph.tensors()["x"]])
    (again,) = walker.advance([graph.tensors()["x"], graph.tensors()["q"]])
    np.testing.assert_array_equal(first["x"], again["x"])


@pytest.mark.parametrize("name", ["p", "q", "unused"])
def test_backwards_is_refused(name):
    graph = chain()
    walker = GraphWalker(graph, feeds_of(2), threads=1)
    walker.advance([graph.tensors()["r"]])
    with pytest.raises(PassError, match=f"'{name}' has been given up.*goes forward only"):
        walker.advance([graph.tensors()[name]])


def test_a_tensor_of_another_graph_is_refused():
    walker = GraphWalker(chain(), feeds_of(2), threads=1)
    with pytest.raises(
        PassError, match="'z' has been given up, or is no tensor of this graph"
    ):
        walker.advance([gs.Variable("z", np.float32, [2, 4])])


def test_there_must_be_samples():
    with pytest.raises(InputError, match=r"no samples .*Give at least one"):
        GraphWalker(chain(), [])


def test_each_sample_must_be_whole():
    feeds = feeds_of(2, 3)
    del feeds[1]["x"]
    with pytest.raises(InputError, match=r"Sample 2 of 2 does not give x.*Give every input"):
        GraphWalker(chain(), feeds)


def test_what_onnx_runtime_refuses_is_named():
    feeds = [{"x": np.zeros((2, 5), np.float32), "unused": np.zeros((2, 4), np.float32)}]
    graph = chain()
    with pytest.raises(EngineError, match="cannot run the graph 'g'"):
        GraphWalker(graph, feeds, threads=1).advance([graph.tensors()["p"]])


def test_rows():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(rows_of(values), values.reshape(6, 4))


def test_float16_graphs_come_later():
    with pytest.raises(PassError, match=r"'x' is float16; quantize the float32 graph"):
        check_dtype(gs.Variable("x", np.dtype(np.float16), [1]))
