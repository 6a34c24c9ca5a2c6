"""Shapes at given axes against what a run really has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.bound_shapes import bound_shapes, evaluate_axis
from mvlm_export.passes.graph_io import to_model
from tests.passes.counted import one_node
from tests.passes.graphs import nano_graph, random_feeds, run_graph


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
