"""The matcher of sub-graphs, and the questions asked of a match."""

import pytest

from mvlm_export.passes.matching import (
    any_,
    cast,
    const,
    constant_problem,
    describe,
    find_matches,
    match_tensor,
    one_of,
    op,
)
from tests.passes.graphs import parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def graph_of(body, outputs="float[4] y", inputs="float[4] x, float[4] z"):
    text = f"{HEAD}g ({inputs}) => ({outputs}) <float[4] w = {{1, 2, 3, 4}}> {{ {body} }}"
    return parse_graph(text)


def match(pattern, graph):
    return match_tensor(pattern, graph.outputs[0])


def test_bindings_name_nodes_and_tensors():
    graph = graph_of("a = Mul(x, w)  y = Sub(a, z)")
    found = match(
        op("Sub", op("Mul", any_("data"), const("weight"), bind="mul"), any_()), graph
    )
    assert (found["data"].name, found["weight"].name) == ("x", "w")
    assert found["mul"].op == "Mul"
    assert [node.op for node in found.nodes] == ["Sub", "Mul"]
    assert "weight" in found
    assert "bias" not in found


@pytest.mark.parametrize("order", ["x, w", "w, x"])
def test_commutative_operands_stand_in_either_order(order):
    found = match(op("Mul", any_("data"), const("weight")), graph_of(f"y = Mul({order})"))
    assert found["weight"].name == "w"


def test_operands_of_other_nodes_keep_their_order():
    pattern = op("Sub", any_(), const())
    assert match(pattern, graph_of("y = Sub(x, w)"))
    assert match(pattern, graph_of("y = Sub(w, x)")) is None


@pytest.mark.parametrize("body", ["r = Relu(x)  y = Add(r, x)", "r = Relu(x)  y = Add(x, r)"])
def test_a_diamond_is_a_name_bound_twice(body):
    pattern = op("Add", op("Relu", any_("x")), any_("x"))
    assert match(pattern, graph_of(body))["x"].name == "x"
    assert match(pattern, graph_of(body.replace("Relu(x)", "Relu(z)"))) is None


def test_bindings_of_a_failed_order_are_undone():
    pattern = op("Add", op("Relu", any_("a")), op("Neg", any_("b")))
    found = match(pattern, graph_of("n = Neg(z)  r = Relu(x)  y = Add(n, r)"))
    assert (found["a"].name, found["b"].name) == ("x", "z")
    assert len(found.nodes) == 3


@pytest.mark.parametrize(
    ("body", "seen"),
    [("y = Relu(x)", False), ("c = Cast<to=1>(x)  y = Relu(c)", True)],
    ids=["without", "with"],
)
def test_a_cast_may_stand_in_front(body, seen):
    found = match(op("Relu", cast(any_("x"), bind="cast")), graph_of(body))
    assert found["x"].name == "x"
    assert ("cast" in found) is seen


def test_alternatives_are_tried_in_order():
    pattern = one_of(op("Div", any_("x"), any_("d")), op("Mul", any_("x"), any_("r")))
    assert "r" in match(pattern, graph_of("y = Mul(x, z)"))
    assert "d" in match(pattern, graph_of("y = Div(x, z)"))
    assert match(pattern, graph_of("y = Sub(x, z)")) is None


def test_the_number_of_inputs_and_the_output_are_looked_at():
    body = "a, y = Split<axis=0, num_outputs=2>(x)"
    graph = graph_of(body, outputs="float[2] y")
    assert match(op("Split", any_(), output=1), graph)
    assert match(op("Split", any_()), graph) is None
    assert match(op("Split", any_(), output=None), graph)
    assert match(op("Split", any_(), any_(), output=1), graph) is None
    clip = graph_of("y = Clip(x, lo, hi)", inputs="float[4] x, float lo, float hi")
    assert match(op("Clip", any_()), clip)
    assert match(op("Clip", any_(), exact=True), clip) is None


def test_operators_of_other_domains_are_strangers():
    graph = graph_of("y = Relu(x)")
    graph.nodes[0].domain = "com.microsoft"
    assert match(op("Relu", any_()), graph) is None


def test_every_match_is_found_in_the_graph_as_it_is_by_then():
    graph = graph_of("a = Relu(x)  b = Relu(a)  c = Relu(b)  y = Neg(c)")
    seen = []
    for found in find_matches(graph, op("Relu", any_("x"))):
        seen.append(found.root.name)
        if found.root.name == "a":
            graph.nodes[1].inputs.clear()
            graph.nodes[1].outputs.clear()
    assert seen == ["a", "c"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("r = Relu(x)  y = Add(r, z)", "float[4] y", None),
        ("r = Relu(x)  y = Add(r, z)  v = Neg(r)", "float[4] y, float[4] v", "read by Neg"),
        ("r = Relu(x)  y = Add(r, z)", "float[4] y, float[4] r", "an output of the graph"),
    ],
    ids=["inner", "read-elsewhere", "graph-output"],
)
def test_used_elsewhere(body, outputs, reason):
    graph = graph_of(body, outputs)
    found = match(op("Add", op("Relu", any_()), any_()), graph)
    problem = found.used_elsewhere(graph)
    assert problem is None if reason is None else reason in problem


def test_constant_problem():
    def problem_of(body, name="w", outputs="float[4] y", inputs="float[4] x, float[4] z"):
        graph = graph_of(body, outputs, inputs)
        return constant_problem(graph, graph.tensors()[name], graph.nodes[0])

    assert problem_of("y = Mul(x, w)") is None
    assert "is an input of the graph" in problem_of("y = Mul(x, z)", "z")
    shared = problem_of("y = Mul(x, w)  v = Neg(w)", outputs="float[4] y, float[4] v")
    assert shared == "the weight 'w' is shared with Neg 'v'"
    assert "computed by Relu" in problem_of("r = Relu(w) y = Mul(x, r)", "r")


def test_describe_names_the_node_or_its_output():
    graph = graph_of("y = Relu(x)")
    assert describe(graph.nodes[0]) == "Relu 'y'"
    graph.nodes[0].name = "layer_3"
    assert describe(graph.nodes[0]) == "Relu 'layer_3'"
