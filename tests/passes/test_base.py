"""The contract of a pass, and the manager."""

from collections.abc import Callable
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
from mvlm_export.passes.type_inference import infer_types
from mvlm_export.passes.verify import SIZES, IdRange, OrtVerifier
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
    (tmp_path / "07-of-an-earlier-run.onnx").touch()
    (tmp_path / "mine.onnx").touch()
    steps = [Step(Refuse()), Step(DropSecondRelu())]
    PassManager(steps, dump_dir=tmp_path).run(graph())
    (tmp_path / "mine.onnx").unlink()
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

    with pytest.raises(PassError, match=r"changed the graph's outputs from y float32"):
        PassManager([Step(ToDouble())], verifier=OrtVerifier({})).run(graph())


DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
g (int32[S] input_ids, float[I,2] image_embeds, float[T,3] past) => (float[S,2] y)
<float[5,2] table, int32 five = {5}, int32 last = {4}, int32 zero = {0}, int64[1] one = {1}> {
  is_row = GreaterOrEqual(input_ids, five)
  mask = Unsqueeze(is_row, one)
  word = Min(input_ids, last)
  text = Gather(table, word)
  moved = Sub(input_ids, five)
  place = Max(moved, zero)
  rows = Gather(image_embeds, place)
  y = Where(mask, rows, text)
}
"""


def decoder():
    return parse_graph(DECODER, table=np.arange(10, dtype=np.float32).reshape(5, 2))


def test_feeds_are_seeded_and_of_several_sizes():
    verifier, again = (OrtVerifier({"input_ids": IdRange(5, rows=True)}) for _ in range(2))
    feeds = verifier.make_feeds(decoder())
    assert [len(feed["input_ids"]) for feed in feeds] == [sizes["S"] for sizes in SIZES]
    assert [len(feed["past"]) for feed in feeds] == [sizes["T"] for sizes in SIZES]
    assert {len(feed["input_ids"]) for feed in feeds} >= {1}
    assert {len(feed["past"]) for feed in feeds} >= {0}
    ids = np.concatenate([feed["input_ids"] for feed in feeds])
    assert (ids < 5).sum() >= 4
    assert (ids >= 5).sum() >= 4
    for feed, other in zip(feeds, again.make_feeds(decoder()), strict=True):
        for name, values in feed.items():
            np.testing.assert_array_equal(values, other[name])


def test_sizes_that_make_no_difference_run_once():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (uint8[2,2] pixels) => (uint8[2,2] y) { y = Identity(pixels) }
    """
    (feeds,) = OrtVerifier({}).make_feeds(parse_graph(text))
    assert feeds["pixels"].dtype == np.uint8


@dataclass(frozen=True)
class Edit(Pass):
    """Any edit, said to be exact."""

    name = "edit"
    summary = "does what a test wants"
    change: Callable[[gs.Graph], None]

    def run(self, graph):
        self.change(graph)
        return PassResult(1, 1)


def negate_image_rows(graph):
    rows = next(tensor for tensor in graph.inputs if tensor.name == "image_embeds")
    gather = consumers(rows)[0]
    gather.inputs[0] = insert_node(graph, "Neg", [rows], rows)


def test_the_verifier_reads_image_rows():
    verifier = OrtVerifier({"input_ids": IdRange(5, rows=True)})
    with pytest.raises(PassError, match="changed the output 'y'"):
        PassManager([Step(Edit(negate_image_rows))], verifier=verifier).run(decoder())


def reshape_for_a_batch_of_two(graph):
    graph.nodes[0].inputs[1].values = np.array([2, 4], np.int64)
    graph.nodes[0].outputs[0].shape = [2, 4]


def drop_a_channel(graph):
    graph.tensors()["w"].values = np.array([1] * 262143 + [0], np.float32)


def add_one(graph):
    graph.tensors()["w"].values = np.array(1, np.int64)


@pytest.mark.parametrize(
    ("signature", "body", "weights", "change", "complaint"),
    [
        (
            "(float[B,2,2] x) => (float[B,4] y) <int64[2] w>",
            "a = Reshape(x, w)  y = Relu(a)",
            np.array([-1, 4]),
            reshape_for_a_batch_of_two,
            "changed|cannot|shape",
        ),
        (
            "(float16[B,262144] x) => (float16[B,262144] y) <float[262144] w>",
            "h = Cast<to=10>(w)  y = Mul(x, h)",
            np.ones(262144, np.float32),
            drop_a_channel,
            "a part of the output 'y' along axis 1",
        ),
        (
            "(float[B,9] x) => (int64[B] y) <int64 w>",
            "a = ArgMax<keepdims=0, axis=1>(x)  y = Add(a, w)",
            np.array(0),
            add_one,
            "whole numbers",
        ),
    ],
    ids=["a-batch-size", "one-channel", "whole-numbers"],
)
def test_the_verifier_finds_what_a_norm_hides(signature, body, weights, change, complaint):
    text = f'<ir_version: 10, opset_import: ["" : 20]> g {signature} {{ {body} }}'
    wrong = parse_graph(text, w=weights)
    with pytest.raises(PassError, match=complaint):
        PassManager([Step(Edit(change))], verifier=OrtVerifier({})).run(wrong)


def test_equal_infinities_are_no_change():
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B,4] x) => (float[B,4] y) <float[4] w> { a = Relu(x)  b = Relu(a)  y = Add(b, w) }
    """
    infinite = parse_graph(text, w=np.array([0, -np.inf, 0, np.nan], np.float32))
    (record,) = PassManager([Step(DropSecondRelu())], verifier=OrtVerifier({})).run(infinite)
    assert record.verified == 0.0


def test_a_changed_border_must_be_said():
    def freeze(graph):
        graph.inputs[0].shape = [2, 4]

    def rename(graph):
        graph.outputs[0].name = "z"

    with pytest.raises(PassError, match=r"changed the graph's inputs from x .*'B', 4"):
        Edit(freeze).apply(graph())
    with pytest.raises(PassError, match=r"changed the graph's outputs from y .* to z"):
        Edit(rename).apply(graph())


def test_a_changed_rank_is_found():
    def widen(graph):
        graph.tensors()["w"].values = np.ones((1, 1, 4), np.float32)

    with pytest.raises(PassError, match="differ in rank"):
        Edit(widen).apply(graph())


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


def test_operands_must_be_of_one_type():
    """ONNX's own inference lets it pass."""

    def mix(graph):
        graph.tensors()["w"].values = np.ones(4, np.float16)

    with pytest.raises(
        PassError, match=r"Mul .* takes 'b', which is float32, and 'w', which is f"
    ):
        Edit(mix).apply(graph())


def test_an_output_cannot_become_an_input_or_another_output():
    text = TEXT.replace("=> (float[B,4] y)", "=> (float[B,4] y, float[B,4] a)")
    two = parse_graph(text, w=np.ones(4, np.float32))
    tensors = two.tensors()
    with pytest.raises(PassError, match="'y' cannot become 'x'"):
        replace_tensor(two, tensors["y"], tensors["x"])
    with pytest.raises(PassError, match="'y' cannot become 'a'"):
        replace_tensor(two, tensors["y"], tensors["a"])
    two.outputs[1] = two.outputs[0]
    with pytest.raises(PassError, match="two of the graph's outputs are one tensor"):
        infer_types(two)
