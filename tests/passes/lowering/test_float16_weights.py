"""Weights that become float16, and those that it does not hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from mvlm_export.passes.lowering.float16_weights import float16_problem
from tests.passes.graphs import (
    constants,
    parse_graph,
    random_feeds,
    run_graph,
)
from tests.passes.lowering.float16_graphs import (
    BEFORE,
    HEAD,
    check,
    dtypes,
    relative,
    weights,
)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1e6, "the weight 'k' holds 1e+06, beyond float16's 65504"),
        (65505.0, "the weight 'k' holds 65505, beyond"),
        (-7e4, "the weight 'k' holds 70000, beyond"),
    ],
)
def test_an_overflowing_weight_is_named_and_kept(value, reason):
    k = weights()["k"].copy()
    k[1, 2] = value
    graph = parse_graph(BEFORE, **weights(k=k))
    rewrite = ConvertToFloat16(keep_io=["logits"])
    result = rewrite.apply(graph)
    assert (result.matched, result.rewritten) == (7, 6)
    assert "MatMul" in result.refusals[0].node
    assert reason in result.refusals[0].reason
    np.testing.assert_array_equal(constants(graph)["k"], k)
    keys = next(node for node in graph.nodes if node.outputs[0].name == "keys")
    assert [np.dtype(t.dtype) for t in (*keys.inputs, *keys.outputs)] == [np.float32] * 3


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (1e-9, "would be all zeros in float16 (largest: "),
        (1e-7, "its cosine with what it was"),
    ],
)
def test_an_underflowing_weight_is_named_and_kept(scale, reason):
    graph = parse_graph(BEFORE, **weights(k=weights()["k"] * np.float32(scale)))
    result = check(graph)
    assert (result.matched, result.rewritten) == (7, 6)
    assert "the weight 'k'" in result.refusals[0].reason
    assert reason in result.refusals[0].reason


def test_the_largest_numbers_and_zeros_are_converted():
    k = np.zeros((4, 4), np.float32)
    assert check(parse_graph(BEFORE, **weights(k=k))).rewritten == 7
    k[0, 0] = 65504
    assert float16_problem("k", k, exact=False) is None


def test_nan_in_a_weight_is_an_error():
    k = weights()["k"].copy()
    k[0, 0] = np.nan
    with pytest.raises(PassError, match="the weight 'k' holds values that are no numbers"):
        ConvertToFloat16().apply(parse_graph(BEFORE, **weights(k=k)))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_mask_of_infinities_keeps_its_node(value):
    text = "g (float[4,4] x) => (float[4,4] y) { a = Relu(x)\n b = Min(a, m)\n y = Neg(b) }"
    text = text.replace("Min", "Max") if value < 0 else text
    mask = np.where(np.tri(4) > 0, np.float32(0.5), np.float32(value))
    graph = parse_graph(HEAD + text, m=mask)
    before, result = graph.copy(), ConvertToFloat16().apply(graph)
    feeds = {"x": np.arange(16, dtype=np.float16).reshape(4, 4)}
    found = run_graph(graph, feeds)["y"]
    expected = run_graph(before, {"x": feeds["x"].astype(np.float32)})["y"]
    np.testing.assert_array_equal(found, expected.astype(np.float16))
    assert (result.matched, result.rewritten) == (3, 2)
    assert "the weight 'm' holds inf, beyond float16's" in result.refusals[0].reason


@pytest.mark.parametrize("op", ["Div", "Mod<fmod=1>"])
def test_divisors_are_held_exactly(op):
    text = f"g (float[4] x) => (float[4] y) {{ a = Relu(x)\n b = {op}(a, d)\n y = Neg(b) }}"
    divisors = np.array([1, 2, 1e-8, 1], np.float32)
    graph = parse_graph(HEAD + text, d=divisors)
    result = ConvertToFloat16().apply(graph)
    assert (result.matched, result.rewritten) == (3, 2)
    assert "the constant 'd' holds 1e-08, which float16 does not" in result.refusals[0].reason
    np.testing.assert_array_equal(constants(graph)["d"], divisors)


@pytest.mark.parametrize("value", [1e-6, -1e30, 1e5, -np.inf])
def test_scalars_that_float16_does_not_hold_keep_their_node(value):
    text = (
        "g (float[S] x) => (float[S] y) <float c> { a = Relu(x)\n b = Add(a, c)\n y = Neg(b) }"
    )
    graph = parse_graph(HEAD + text, c=np.array(value, np.float32))
    result = ConvertToFloat16().apply(graph)
    assert (result.matched, result.rewritten) == (3, 2)
    assert "the constant 'c' holds" in result.refusals[0].reason
    assert dtypes(graph, "Add") == {"float32"}


def test_a_shared_weight_stays_for_those_that_need_float32():
    text = """g (float[S,4] x) => (float[S,4] y) <float[4] w> {
      a = Mul(x, w)
      e = Exp(x)
      b = Mul(e, w)
      y = Add(a, b) }"""
    graph = parse_graph(HEAD + text, w=weights()["n"])
    check(graph)
    assert {"w", "w.float16"} <= set(constants(graph))


@given(
    st.lists(st.floats(-60000, 60000, width=32), min_size=2, max_size=40),
    st.sampled_from([1.0, 1e-3, 1e-6, 1e-9]),
)
def test_what_is_said_of_weights_is_true(numbers, scale):
    values = np.array(numbers, np.float32) * np.float32(scale)
    narrow = values.astype(np.float16).astype(np.float64)
    problem = float16_problem("w", values, exact=False)
    if problem is None:
        assert np.isfinite(narrow).all()
        norms = np.linalg.norm(values.astype(np.float64)) * np.linalg.norm(narrow)
        assert not values.any() or narrow @ values >= 0.9998 * norms
    else:
        assert relative(narrow, values) > 0.01


def test_quantizer_scales_are_held_exactly():
    values = np.array([0.5, 3e-7], np.float32)
    assert float16_problem("s", values, exact=False) is None
    assert "'s' holds 3e-07" in float16_problem("s", values, exact=True)


# Constants that are no initializers of inner nodes


def test_constant_nodes_become_float16_weights():
    text = """g (float[S,2] x) => (float[S,2] y) {
      c = Constant<value=float[2] {1.5, 3}>()
      y = Add(x, c) }"""
    graph = parse_graph(HEAD + text)
    assert check(graph).rewritten == 1
    assert [node.op for node in graph.nodes] == ["Add"]
    np.testing.assert_array_equal(
        constants(graph)["c.float16"], np.array([1.5, 3], np.float16)
    )


def test_constant_nodes_of_another_form_are_an_error():
    text = "g (float[2] x) => (float[2] y) { c = Constant<value_floats=[1.0, 2.0]>()\n"
    graph = parse_graph(HEAD + text + "y = Add(x, c) }")
    with pytest.raises(PassError, match="Constant 'c' holds its numbers as value_floats"):
        ConvertToFloat16().apply(graph)


@pytest.mark.parametrize("keep", [[], ["w"]], ids=["converted", "kept"])
def test_a_weight_that_is_an_output_of_the_graph(keep):
    text = "g (float[S,2] x) => (float[S,2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"
    graph = parse_graph(HEAD + text)
    graph.outputs.append(graph.tensors()["w"])
    rewrite, before = ConvertToFloat16(keep_io=keep), graph.copy()
    rewrite.apply(graph)
    feeds = random_feeds(graph)
    expected = rewrite.outputs_after(run_graph(before, rewrite.feeds_before(feeds)), feeds)
    found = run_graph(graph, feeds)
    assert list(found) == ["y", "w"]
    assert found["w"].dtype == expected["w"].dtype == (np.float32 if keep else np.float16)
    np.testing.assert_array_equal(found["w"], expected["w"])
