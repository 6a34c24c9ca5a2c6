"""The contract of a pass, and the manager."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.base import (
    Expect,
    GraphSize,
    Pass,
    PassManager,
    PassResult,
    Refusal,
    Step,
    Tally,
)
from mvlm_export.passes.editing import (
    consumers,
    fresh_name,
    insert_node,
    is_graph_output,
    live_nodes,
    replace_tensor,
    unlink,
)
from mvlm_export.passes.verify import AXES, OrtVerifier
from tests.passes.graphs import parse_graph

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[B,4] x) => (float[B,4] y) <float[4] w> {
  a = Relu(x)
  b = Relu(a)
  y = Mul(b, w)
}
"""


def graph():
    return parse_graph(TEXT, w=np.arange(4, dtype=np.float32))


class DropSecondRelu(Pass):
    name = "drop-second-relu"
    summary = "relu(relu(x)) is relu(x)"

    def run(self, graph):
        tally = Tally()
        for node in live_nodes(graph):
            before = node.inputs[0].inputs
            if node.op == "Relu" and before and before[0].op == "Relu":
                replace_tensor(graph, node.outputs[0], node.inputs[0])
                tally.rewrote()
        return tally.result()


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the graph's output: changes the numbers unless the factor is 1."""

    name = "scale"
    summary = "y times a factor"
    factor: float = 1.0

    def run(self, graph):
        old = graph.outputs[0]
        new = insert_node(graph, "Mul", [old, np.float32(self.factor).reshape(())], old)
        scaled = new.inputs[0]
        replace_tensor(graph, old, new)
        scaled.inputs[0] = old
        return PassResult(1, 1)


class Refuse(Pass):
    name = "refuse"
    summary = "refuses all"

    def run(self, graph):
        tally = Tally()
        tally.refuse(graph.nodes[0], "the weight 'w' is shared")
        return tally.result()


class Crash(Pass):
    name = "crash"
    summary = "raises"

    def run(self, graph):
        raise KeyError("absent")


class Dangle(Pass):
    name = "dangle"
    summary = "leaves a tensor that nobody makes"

    def run(self, graph):
        graph.nodes[-1].inputs[0] = gs.Variable("nowhere", np.float32, ["B", 4])
        return PassResult(1, 1)


def test_apply_sweeps_sorts_and_infers():
    changed = graph()
    result = DropSecondRelu().apply(changed)
    assert (result.matched, result.rewritten, result.refusals) == (1, 1, ())
    assert [node.op for node in changed.nodes] == ["Relu", "Mul"]
    assert changed.outputs[0].shape == ["B", 4]


def test_a_result_must_add_up():
    with pytest.raises(PassError, match="matched 2 places, rewrote 1 and refused 0"):
        PassResult(2, 1)
    assert PassResult(2, 1, (Refusal("n", "r"),)).refusals[0].reason == "r"


def test_the_opset_is_required():
    old = parse_graph(TEXT.replace('"" : 20', '"" : 12'), w=np.ones(4, np.float32))
    with pytest.raises(PassError, match="opset 13 to 24, and the graph has 12"):
        DropSecondRelu().apply(old)


def test_records_say_what_changed():
    steps = [Step(DropSecondRelu(), Expect(1, "one pair")), Step(Refuse())]
    first, second = PassManager(steps).run(graph())
    assert (first.before, first.after) == (GraphSize(3, 1, 16), GraphSize(2, 1, 16))
    assert first.seconds >= 0
    assert second.before == second.after
    assert second.to_json()["result"]["refusals"][0]["reason"] == "the weight 'w' is shared"


@pytest.mark.parametrize(
    ("steps", "complaints"),
    [
        (
            [Step(DropSecondRelu(), Expect(3, "three pairs"))],
            [
                "Pass 1, drop-second-relu",
                "must make 3 rewrites (three pairs), but made 1 of 1",
            ],
        ),
        (
            [Step(DropSecondRelu()), Step(Refuse(), Expect(1, "one"))],
            ["Relu 'a': the weight 'w' is shared", "before it: drop-second-relu", "refuse"],
        ),
        ([Step(Scale()), Step(Crash())], ["Pass 2, crash", "KeyError", "before it: scale"]),
        ([Step(Dangle())], ["dangle", "nobody makes 'nowhere'", "before it: none"]),
    ],
    ids=["missed", "refused", "crash", "dangling"],
)
def test_failures_name_the_pass_and_those_before(steps, complaints):
    with pytest.raises(PassError) as caught:
        PassManager(steps).run(graph())
    for complaint in complaints:
        assert complaint in str(caught.value)
    assert caught.value.__cause__ is not None


def test_dumps_are_numbered_and_only_of_passes_that_changed_something(tmp_path):
    steps = [Step(Refuse()), Step(DropSecondRelu())]
    PassManager(steps, dump_dir=tmp_path).run(graph())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00-captured.onnx", "02-drop-second-relu.onnx"]
    kinds = [
        [node.op_type for node in onnx.load(str(tmp_path / name)).graph.node] for name in names
    ]
    assert kinds == [["Relu", "Relu", "Mul"], ["Relu", "Mul"]]


def test_the_listener_hears_of_every_pass():
    heard = []
    PassManager([Step(Refuse()), Step(Scale())], listener=lambda *a: heard.append(a)).run(
        graph()
    )
    assert heard == [(1, 2, "refuse"), (2, 2, "scale")]


def test_the_verifier_passes_what_is_exact():
    steps = [Step(DropSecondRelu()), Step(Refuse()), Step(Scale(1.0))]
    records = PassManager(steps, verifier=OrtVerifier({})).run(graph())
    assert [record.verified for record in records] == [0.0, None, 0.0]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_the_verifier_finds_changed_numbers(factor):
    steps = [Step(DropSecondRelu()), Step(Scale(factor))]
    with pytest.raises(PassError, match=r"Pass 2, scale.*changed the output 'y' by"):
        PassManager(steps, verifier=OrtVerifier({})).run(graph())


def test_the_verifier_finds_an_output_of_another_type():
    class ToDouble(Scale):
        name = "to-double"

        def run(self, graph):
            old = graph.outputs[0]
            new = insert_node(graph, "Cast", [old], old, dtype=np.float64, attrs={"to": 11})
            node = new.inputs[0]
            replace_tensor(graph, old, new)
            node.inputs[0] = old
            return PassResult(1, 1)

    with pytest.raises(PassError, match=r"'y' is float64 .* where float32"):
        PassManager([Step(ToDouble())], verifier=OrtVerifier({})).run(graph())


def test_feeds_are_seeded_and_in_range():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (int32[S] ids, uint8[B,2] pixels, float[T,3] past) => (int32[S] y) { y = Neg(ids) }
    """
    feeds = OrtVerifier({"ids": 4}).make_feeds(parse_graph(text))
    again = OrtVerifier({"ids": 4}).make_feeds(parse_graph(text))
    assert feeds["ids"].shape == (AXES["S"],)
    assert feeds["ids"].max() < 4
    assert feeds["pixels"].dtype == np.uint8
    assert feeds["past"].shape == (AXES["T"], 3)
    for name, values in feeds.items():
        np.testing.assert_array_equal(values, again[name])


def test_fresh_names_are_taken_by_nobody():
    changed = graph()
    assert fresh_name(changed, "c") == "c"
    assert fresh_name(changed, "a") == "a_1"
    assert fresh_name(changed, "c", reserved=["c", "c_1"]) == "c_2"
    assert fresh_name(changed, "y") == "y_1"


def test_replace_tensor_moves_consumers_and_keeps_output_names():
    changed = graph()
    tensors = changed.tensors()
    replace_tensor(changed, tensors["b"], tensors["a"])
    assert [node.op for node in consumers(tensors["a"])] == ["Relu", "Mul"]
    old = changed.outputs[0]
    new = insert_node(changed, "Neg", [tensors["a"]], old)
    replace_tensor(changed, old, new)
    assert changed.outputs[0] is new
    assert new.name == "y"
    assert old.name != "y"
    assert is_graph_output(changed, new)
    assert not is_graph_output(changed, old)


def test_unlinked_nodes_are_gone():
    changed = graph()
    node = changed.nodes[0]
    unlink(node)
    assert all(other is not node for other in live_nodes(changed))
    assert changed.tensors()["a"].inputs == []


def test_two_tensors_of_one_name_are_found():
    class Duplicate(Pass):
        name = "duplicate"
        summary = "names two tensors alike"

        def run(self, graph):
            graph.nodes[1].outputs[0].name = "a"
            return PassResult(1, 1)

    with pytest.raises(PassError, match="two tensors are named 'a'"):
        Duplicate().apply(graph())


def test_a_wrong_recorded_shape_is_found():
    class Misshape(Pass):
        name = "misshape"
        summary = "records a wrong shape"

        def run(self, graph):
            graph.tensors()["b"].shape = ["B", 5]
            return PassResult(1, 1)

    with pytest.raises(PassError, match="'b' is recorded with an axis of 5, which is 4"):
        Misshape().apply(graph())
