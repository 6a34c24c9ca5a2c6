"""Two graphs compared by their figures."""

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.passes.comparison import compare
from mvlm_export.passes.statistics import graph_statistics
from tests.passes.counted import UNKNOWN_AXIS, W, statistics_of
from tests.passes.graphs import nano_graph, parse_graph


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
