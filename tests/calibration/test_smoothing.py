"""Scales of channels move from activations into weights without changing the result."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.calibration.smoothing import MoveScales, find_sites
from mvlm_export.engines.errors import PassError
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.deferred import is_deferred, values_of
from mvlm_export.passes.pipeline import LAST_ROW_PASS, PipelineOptions, exact_steps
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    constants,
    parse_graph,
    random_feeds,
    run_graph,
    tiny_config,
    tiny_graph,
)
from tests.passes.test_pipeline import facts_of

from .nano_models import FOLDS, GRAPHS, nano, run_exactly, twin

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
RMSNORM = (
    HEAD
    + """
g (float[S,4] x) => (float[S,6] y, float[S,2] z)
<int64[1] axes = {-1}, float eps = {0.000001}, float[4,6] w, float[4,2] v> {
  s = Mul(x, x)
  m = ReduceMean(s, axes)
  e = Add(m, eps)
  r = Sqrt(e)
  i = Reciprocal(r)
  n = Mul(x, i)
  y = MatMul(n, w)
  z = MatMul(n, v)
}
"""
)
RMSNORM_AFTER = (
    RMSNORM.replace("  y = ", "  k = Mul(n, c)\n  y = ").replace("MatMul(n", "MatMul(k")
    .replace("float[4,6] w", "float[4] c, float[4,6] w")
)  # fmt: skip
WEIGHTED = RMSNORM_AFTER
LAYERNORM = (
    HEAD
    + """
g (float[B,3,4] x) => (float[B,3,6] y, float[B,3,2] z)
<float[4] scale, float[4] shift, float[4,6] w, float[4,2] v> {
  n = LayerNormalization(x, scale, shift)
  y = MatMul(n, w)
  z = MatMul(n, v)
}
"""
)
UNSHIFTED = LAYERNORM.replace(", shift)", ")").replace("float[4] shift, ", "")
NO_SHIFT = LAYERNORM.replace(", shift)", ", )").replace("float[4] shift, ", "")
GATED = (
    HEAD
    + """
g (float[S,4] x) => (float[S,3] y) <float[4,10] u, int64[2] sizes = {5, 5}, float[5,3] w> {
  p = MatMul(x, u)
  a, b = Split<axis=-1>(p, sizes)
  s = Sigmoid(a)
  g = Mul(a, s)
  n = Mul(g, b)
  y = MatMul(n, w)
}
"""
)
APART = (
    HEAD
    + """
g (float[S,4] x) => (float[S,3] y) <float[4,5] u, float[4,5] t, float[5,3] w> {
  a = MatMul(x, t)
  b = MatMul(x, u)
  s = Tanh(a)
  n = Mul(b, s)
  y = MatMul(n, w)
}
"""
)
SHAPES = {"w": (4, 6), "v": (4, 2), "scale": (4,), "shift": (4,), "c": (4,)}
GATED_SHAPES = {"u": (4, 10), "w": (5, 3)}
APART_SHAPES = {"u": (4, 5), "t": (4, 5), "w": (5, 3)}


def graph_of(text, seed=0, **changes):
    """A graph whose constants are random, each positive or negative."""
    generator = np.random.default_rng(seed)
    shapes = SHAPES
    if "MatMul(x, u)" in text:
        shapes = GATED_SHAPES if "float[4,10] u" in text else APART_SHAPES
    declared = text.split("=>")[1].split("{\n")[0]
    weights = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in (shapes | changes).items()
        if re.search(rf"\] {name}\b", declared)
    }
    return parse_graph(text, **weights)


def move(graph, scales, sizes=None, **ranges):
    """Apply the pass; the numbers must be the same."""
    before = graph.copy()
    result = MoveScales(scales).apply(graph)
    assert (result.matched, result.rewritten) == (len(scales), len(scales))
    feeds = random_feeds(graph, sizes, **ranges)
    expected, found = run_graph(before, feeds), run_graph(graph, feeds)
    for name, values in expected.items():
        assert_close(found[name], values)


def scales_of(width, seed=3, spread=1.0):
    return np.random.default_rng(seed).lognormal(0, spread, width).astype(np.float32)


FORMS = {
    "rmsnorm": (RMSNORM, RMSNORM_AFTER),
    "rmsnorm-weight": (WEIGHTED, WEIGHTED),
    "layernorm": (LAYERNORM, LAYERNORM),
    "layernorm-unshifted": (UNSHIFTED, UNSHIFTED),
    "layernorm-no-shift": (NO_SHIFT, NO_SHIFT),
    "gate": (GATED, GATED),
    "gate-apart": (APART, APART),
}


@pytest.mark.parametrize("name", FORMS)
def test_before_and_expected(name):
    before, after = FORMS[name]
    graph = graph_of(before)
    (site,) = find_sites(graph)
    assert site.tensor.name == ("k" if name == "rmsnorm-weight" else "n")
    assert [layer.name for layer in site.layers] == (
        ["w"] if name.startswith("gate") else ["w", "v"]
    )
    factors = scales_of(site.tensor.shape[-1])
    old = constants(graph)
    move(graph, {"w": factors})
    assert_same_structure(graph, graph_of(after))
    new = constants(graph)
    for layer in site.layers:
        assert_close(new[f"{layer.name}.smoothed"], old[layer.name] * factors[:, None])
    if name == "layernorm":
        scale, shift = (values_of(t) for t in graph.nodes[0].inputs[1:])
        assert_close(scale, old["scale"] / factors)
        assert_close(shift, old["shift"] / factors)
    if name == "gate":
        assert_close(new["u.smoothed"][:, 5:], old["u"][:, 5:] / factors)
        np.testing.assert_array_equal(new["u.smoothed"][:, :5], old["u"][:, :5])


@settings(max_examples=15)
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 10**6), st.sampled_from([0.1, 2.0, 5.0]))
def test_any_scales(name, seed, spread):
    graph = graph_of(FORMS[name][0], seed=seed)
    width = find_sites(graph)[0].tensor.shape[-1]
    move(graph, {"w": scales_of(width, seed, spread)})


@pytest.mark.parametrize(
    "change",
    [
        ("n = Mul(x, i)", "n = Mul(i, x)"),
        ("i = Reciprocal(r)\n  n = Mul(x, i)", "n = Div(x, r)"),
        ("s = Mul(x, x)", "two = Constant<value_float = 2.0>()\n  s = Pow(x, two)"),
    ],
    ids=["other-order", "div", "pow"],
)
def test_other_spellings_of_rmsnorm(change):
    graph = graph_of(RMSNORM.replace(*change))
    move(graph, {"w": scales_of(4)})
    assert "c" not in constants(graph)


def test_a_factor_for_all_channels_becomes_one_for_each():
    """Half of a GELU: the 0.5 that stands before the product."""
    text = (
        HEAD
        + """
    g (float[S,4] x) => (float[S,6] y) <float half = {0.5}, float[4,6] w> {
      t = Tanh(x)
      n = Mul(half, t)
      y = MatMul(n, w)
    }
    """
    )
    graph = graph_of(text)
    move(graph, {"w": scales_of(4)})
    assert graph.nodes[1].inputs[0].shape == (4,)


def test_a_scale_that_others_read_stays_as_it_is():
    text = LAYERNORM.replace("z = MatMul(n, v)", "k = LayerNormalization(x, scale, shift)\n"
                             "  z = MatMul(k, v)")  # fmt: skip
    graph = graph_of(text)
    assert [site.name for site in find_sites(graph)] == ["w", "v"]
    move(graph, {"w": scales_of(4)})
    move(graph, {"v": scales_of(4, seed=5)})


def exact_names(name, count):
    if name == "vision_encoder":
        return [
            f"encoder.layers.{index}.{part}"
            for index in range(count)
            for part in ("self_attn.q_proj", "mlp.fc1")
        ]
    parts = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    layers = [f"model.layers.{index}.{part}" for index in range(count) for part in parts]
    return [*layers, "lm_head"] if name == "decoder" else []


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    ("model", "disabled"), [(nano, frozenset()), (twin, FOLDS)], ids=["nano", "twin-unfolded"]
)
def test_trained_models(model, disabled, name):
    """Two sites a block of the encoder; QKV, MLP, its product, and the head of the decoder."""
    graph = model().graph(name, disabled)
    sites = find_sites(graph)
    assert [site.name for site in sites] == exact_names(name, 4)
    if not sites:
        return
    assert all(is_deferred(layer.weight) for site in sites for layer in site.layers)
    scales = {s.name: scales_of(s.tensor.shape[-1], seed) for seed, s in enumerate(sites)}
    ids = {"input_ids": 512 + 3} if name == "decoder" else {}
    feeds = [random_feeds(graph, {"I": 3, "T": 2, "S": rows}, rows, **ids) for rows in (1, 6)]
    expected = run_exactly(graph, feeds)
    MoveScales(scales).apply(graph)
    assert all(
        is_deferred(layer.weight) for site in find_sites(graph) for layer in site.layers
    )
    for before, found in zip(expected, run_exactly(graph, feeds), strict=True):
        for output, values in before.items():
            assert_close(found[output], values)


def test_a_decoder_with_fewer_key_heads():
    changes = {"num_key_value_heads": 2, "num_hidden_layers": 1}
    graph, config = tiny_graph("decoder", **changes), tiny_config(**changes)
    options = PipelineOptions("float32", disabled=frozenset({LAST_ROW_PASS}))
    PassManager(exact_steps("decoder", facts_of(config), options)).run(graph)
    sites = find_sites(graph)
    assert [site.name for site in sites] == exact_names("decoder", 1)
    scales = {s.name: scales_of(s.tensor.shape[-1], seed) for seed, s in enumerate(sites)}
    move(graph, scales, {"I": 4}, input_ids=320 + 4)


def without_site(text, *changes, outputs=""):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text.replace("=> (", f"=> ({outputs}", 1)


@pytest.mark.parametrize(
    "text",
    [
        without_site(RMSNORM, ("y = MatMul(n, w)", "k = Tanh(n)\n  y = MatMul(k, w)")),
        without_site(LAYERNORM, outputs="float[B,3,4] n, "),
        without_site(LAYERNORM, ("y =", "q = Neg(n)\n  y ="), outputs="float[B,3,4] q, "),
        without_site(LAYERNORM, ("y =", "q = Neg(v)\n  y ="), outputs="float[4,2] q, "),
        without_site(
            LAYERNORM,
            ("float[B,3,4] x", "float[B,3,4] x, float[4] scale"),
            ("float[4] scale, ", ""),
        ),
        without_site(GATED, ("n = Mul(g, b)", "c = Tanh(b)\n  n = Mul(g, c)")),
        without_site(GATED, ("n = Mul(g, b)", "n = Add(g, b)")),
        without_site(GATED, ("y =", "q = Neg(b)\n  y ="), outputs="float[S,5] q, "),
        without_site(GATED, ("y =", "q = Neg(p)\n  y ="), outputs="float[S,10] q, "),
        without_site(GATED, outputs="float[S,5] b, "),
        without_site(GATED, outputs="float[S,10] p, "),
        without_site(GATED, ("y =", "q = Neg(u)\n  y ="), outputs="float[4,10] q, "),
        without_site(APART, ("n = Mul(b, s)", "n = Mul(b, b)")),
    ],
    ids=[
        "activation-between",
        "output",
        "read-by-another",
        "weight-shared",
        "scale-is-an-input",
        "activation-of-the-factor",
        "sum",
        "factor-read-twice",
        "projection-read-twice",
        "factor-is-output",
        "projection-is-output",
        "projection-shared",
        "square",
    ],
)  # fmt: skip
def test_where_there_is_no_site(text):
    graph = graph_of(text)
    assert [site.name for site in find_sites(graph) if "w" in site.name] == []
    with pytest.raises(PassError, match="no place to scale before w"):
        MoveScales({"w": scales_of(4)}).apply(graph)


def test_rows_that_are_split_off_are_no_columns():
    """Split along the first axis: each part has all columns."""
    text = (
        HEAD
        + """
    g (float[4,4] x) => (float[2,3] y) <float[4,5] u, float[5,3] w> {
      p = MatMul(x, u)
      a, b = Split<axis=0, num_outputs=2>(p)
      s = Tanh(a)
      n = Mul(s, b)
      y = MatMul(n, w)
    }
    """
    )
    assert find_sites(graph_of(text, u=(4, 5))) == []


def test_a_factor_that_is_broadcast_takes_no_channels():
    text = APART.replace("float[4,5] u", "float[4,1] u")
    assert find_sites(graph_of(text, u=(4, 1))) == []


@pytest.mark.parametrize(
    "factors",
    [
        np.ones(5, np.float32),
        np.ones((4, 1), np.float32),
        np.array([1, 2, 0, 1], np.float32),
        np.array([1, 2, -1, 1], np.float32),
        np.array([1, 2, np.nan, 1], np.float32),
        np.array([1, 2, np.inf, 1], np.float32),
    ],
)
def test_scales_that_are_no_scales(factors):
    with pytest.raises(PassError, match="the scales of 'w' are not 4 positive numbers"):
        MoveScales({"w": factors}).apply(graph_of(LAYERNORM))
