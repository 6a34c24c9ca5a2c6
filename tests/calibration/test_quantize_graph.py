"""Whole graphs: what each method is worth, runs that break off, and input that is no good."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.quantize_graph import GraphQuantization, quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import INT8, PRODUCT, RECIPES, GraphRecipe, Rule
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.engines.errors import InputError
from mvlm_export.engines.ort_releases import require_float16_rounding
from mvlm_export.engines.targets import get_target
from mvlm_export.passes.base import PassManager
from mvlm_export.passes.deferred import values_of
from mvlm_export.passes.graph_io import bind_weight
from mvlm_export.passes.pipeline import LAST_ROW_PASS, PipelineOptions, build_pipeline
from mvlm_export.passes.verify import IdRange, OrtVerifier
from tests.ort_versions import NEEDS_INT8_CACHE
from tests.passes.graphs import assert_close, nano_graph, parse_graph
from tests.passes.test_pipeline import facts_of

from .nano_models import (
    FOLDS,
    logit_loss,
    nano,
    other_samples,
    quantize,
    run_exactly,
    twin,
    written,
)

INT4 = WeightFormat(4, 32)
W8A8 = GraphRecipe(INT8, activations=True)
SMOOTH = GraphRecipe(INT8, activations=True, smooth=True)

MLP = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[S,64] x) => (float[S,64] y, float[S,32] z)
<float[64] scale, float[64,96] gate, float[64,96] up, float[96,64] down, float[64,32] head> {
  n = LayerNormalization(x, scale)
  g = MatMul(n, gate)
  u = MatMul(n, up)
  s = Sigmoid(g)
  a = Mul(g, s)
  h = Mul(a, u)
  d = MatMul(h, down)
  y = Add(x, d)
  z = MatMul(y, head)
}
"""
LAYERS = ["gate", "up", "down", "head"]


def mlp(seed=0, **changes):
    generator = np.random.default_rng(seed)
    shapes = {"gate": (64, 96), "up": (64, 96), "down": (96, 64), "head": (64, 32)}
    weights = {
        name: (generator.standard_normal(shape) * 0.2).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights["scale"] = generator.lognormal(0, 1, 64).astype(np.float32)
    graph = parse_graph(MLP, **{**weights, **changes})
    for name in shapes:
        graph.tensors()[name].name = f"{name}.weight"
    return graph


def inputs(*lengths, seed=1):
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((64, 64)) / 8
    return [
        {"x": (generator.standard_normal((n, 64)) @ mix).astype(np.float32)} for n in lengths
    ]


class CountingStore(WeightStore):
    """Notes the layers that are computed."""

    def __init__(self, folder, key=()):
        super().__init__(folder, dict(key))
        self.added = []

    def add(self, name, weight, original):
        self.added.append(name)
        return super().add(name, weight, original)


def run(recipe, store, graph=None, feeds=None, progress=None):
    feeds = inputs(40, 7, 90) if feeds is None else feeds
    graph = mlp() if graph is None else graph
    return quantize_graph(graph, recipe, store, lambda: feeds, 1, progress)


def plan_numbers(chosen: GraphQuantization):
    """All that a plan holds, for comparison."""
    return {
        name: (
            part.input_scales,
            None if part.weight is None else part.weight.load().dequantize().tolist(),
        )
        for name, part in chosen.plan.items()
    }


@pytest.fixture(scope="module")
def decoder():
    """The float decoder's logits on pictures that calibration does not see."""
    feeds = nano().feeds("decoder", other_samples())
    return feeds, [o["logits"] for o in run_exactly(nano().graph("decoder"), feeds)]


def loss_of(decoder, recipe, folder, model=nano, disabled=frozenset(), samples=16):
    chosen = quantize(model(), "decoder", recipe, folder, samples, disabled)
    graph = written(model().graph("decoder", disabled), chosen)
    return logit_loss(graph, decoder[1], decoder[0])


def test_methods_on_a_trained_decoder(decoder, tmp_path):
    """KL in nats a token; 0.018 by rounding to nearest, about a tenth of it by GPTQ."""
    methods = ("rtn", "awq", "gptq", "awq+gptq")
    form = WeightFormat(4, 128)
    loss = {m: loss_of(decoder, GraphRecipe(form, m), tmp_path / m) for m in methods}
    assert 0.01 < loss["rtn"] < 0.03
    assert loss["awq"] < 0.85 * loss["rtn"]
    assert loss["gptq"] < 0.2 * loss["rtn"]
    assert loss["awq+gptq"] < 0.2 * loss["rtn"]


def test_8_bits_on_a_trained_decoder(decoder, tmp_path):
    loss = {
        "weights": loss_of(decoder, GraphRecipe(INT8), tmp_path / "weights"),
        "plain": loss_of(decoder, W8A8, tmp_path / "plain"),
        "smooth": loss_of(decoder, SMOOTH, tmp_path / "smooth"),
        "one sample": loss_of(decoder, W8A8, tmp_path / "one", samples=1),
    }
    assert loss["weights"] < 2e-4
    assert loss["smooth"] < loss["plain"] < 0.01
    assert loss["one sample"] < 0.05


def test_outlier_channels_need_smoothing(decoder, tmp_path):
    """The twin as it is, its outliers not folded away: static 8-bit activations fail."""
    plain = loss_of(decoder, W8A8, tmp_path / "plain", twin, FOLDS)
    smooth = loss_of(decoder, SMOOTH, tmp_path / "smooth", twin, FOLDS)
    assert plain > 1
    assert smooth < 0.005
    assert plain > 200 * smooth
    by_product = replace(W8A8, observer=PRODUCT)
    assert loss_of(decoder, by_product, tmp_path / "product", twin, FOLDS) < 0.1
    by_both = replace(SMOOTH, observer=PRODUCT)
    assert loss_of(decoder, by_both, tmp_path / "both", twin, FOLDS) < 0.005


@pytest.mark.parametrize("name", ["vision_encoder", "projector", "decoder"])
def test_the_whole_pipeline_verifies(name, tmp_path):
    """Each pass's change bounded, counts as planned, float16 behind integers.

    Not so for the encoder: what float16 rounds moves codes of all its activations.
    """
    recipe = GraphRecipe(INT8, activations=True, attention=True)
    if name == "decoder":
        recipe = GraphRecipe(INT4, "rtn", embedding=INT8, rules=(Rule("lm_head", INT8),))
    model = nano()
    chosen = quantize(model, name, recipe, tmp_path, samples=2)
    dtype = "float32" if name == "vision_encoder" else "float16"
    if recipe.activations and dtype == "float16":
        require_float16_rounding(onnxruntime)
    options = PipelineOptions(dtype, frozenset({LAST_ROW_PASS}))
    facts = facts_of(model.config)
    steps = build_pipeline(name, facts, get_target("orin"), options, chosen.steps())
    verifier = OrtVerifier(
        {"input_ids": IdRange(model.config.text.vocab_size, rows=True)}, 0, 1
    )
    records = PassManager(steps, verifier=verifier).run(nano_graph(name))
    (record,) = [r for r in records if r.name == "write-quantization"]
    assert record.result.rewritten == len(chosen.plan)
    assert 0 < record.verified < 0.5


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq+gptq"])
def test_every_layer_is_written(method, tmp_path):
    recipe = GraphRecipe(INT4, method, rules=(Rule("up", None), Rule("head", INT8)))
    chosen = run(recipe, CountingStore(tmp_path / "s"))
    assert list(chosen.plan) == ["gate", "down", "head"]
    assert [part.weight.form for part in chosen.plan.values()] == [INT4, INT4, INT8]
    # A site with a layer in float takes no scales.
    assert set(chosen.scales) == ({"down"} if "awq" in method else set())
    graph = written(mlp(), chosen)
    before, after = (run_exactly(g, inputs(9, seed=5))[0]["z"] for g in (mlp(), graph))
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert 0 < change < 0.2


def test_numbers_are_those_of_its_own_walk(tmp_path):
    """What is written is what later layers were rounded by: a graph of these weights."""
    chosen = run(GraphRecipe(INT4, "awq+gptq"), CountingStore(tmp_path / "s"))
    scaled = mlp()
    steps = chosen.steps()
    PassManager(steps[:1]).run(scaled)
    for layer in find_layers(scaled):
        rounded = chosen.plan[layer.name].weight.load().dequantize()
        bind_weight(scaled, layer.weight.name, rounded)
    feeds = inputs(5, seed=7)
    (expected,), (found,) = (
        run_exactly(scaled, feeds),
        run_exactly(written(mlp(), chosen), feeds),
    )
    assert_close(found["z"], expected["z"])


KV8 = GraphRecipe(kv_cache_dtype="int8")


def with_cache():
    """The MLP with its first two tensors as a layer's keys and values."""
    graph = mlp()
    tensors = graph.tensors()
    graph.outputs = [tensors["z"], tensors["g"], tensors["u"]]
    tensors["g"].name, tensors["u"].name = "present.0.key", "present.0.value"
    return graph


def test_a_cache_reaches_to_its_largest_value(tmp_path):
    """Of any sample, in the float graph; the layers need not be quantized."""
    feeds = inputs(40, 7)
    feeds[1]["x"] *= 3
    store = CountingStore(tmp_path / "s")
    chosen = run(KV8, store, with_cache(), feeds)
    assert not chosen.plan
    assert not chosen.steps()
    found = run_exactly(with_cache(), feeds)
    for name in ("present.0.key", "present.0.value"):
        largest = max(np.abs(sample[name]).max() for sample in found)
        assert chosen.cache_scales[name] == pytest.approx(largest / 127, rel=1e-3)
    assert set(chosen.cache_scales) == {"present.0.key", "present.0.value"}
    again = quantize_graph(with_cache(), KV8, store, lambda: pytest.fail("run again"), 1)
    assert again.cache_scales == chosen.cache_scales


def test_a_cache_counts_what_smoothing_leaves(tmp_path):
    """Scales that move into a key's weight change what is cached."""
    recipe = replace(SMOOTH, kv_cache_dtype="int8")
    feeds = inputs(40)
    chosen = run(recipe, CountingStore(tmp_path / "s"), with_cache(), feeds)
    graph = with_cache()
    PassManager(chosen.steps()[:1]).run(graph)
    (found,) = run_exactly(graph, feeds)
    for name, scale in chosen.cache_scales.items():
        assert scale == pytest.approx(np.abs(found[name]).max() / 127, rel=1e-3)


@NEEDS_INT8_CACHE
def test_the_cpus_decoder_keeps_its_cache_in_8_bits(tmp_path):
    recipe = replace(RECIPES["int4"].decoder, method="rtn", kv_cache_dtype="int8")
    chosen = quantize(nano(), "decoder", recipe, tmp_path, samples=2)
    facts, options = facts_of(nano().config), PipelineOptions("float32")
    quantized = (chosen.steps(), chosen.cache_scales)
    steps = build_pipeline("decoder", facts, get_target("cpu"), options, *quantized)
    ids = IdRange(nano().config.text.vocab_size, rows=True)
    verifier = OrtVerifier({"input_ids": ids}, threads=1)
    records = PassManager(steps, verifier=verifier).run(nano_graph("decoder"))
    (record,) = [r for r in records if r.name == "quantize-kv-cache"]
    assert record.result.rewritten == facts.decoder_layers
    assert 0 < record.verified < 0.1


def test_a_report(tmp_path):
    recipe = GraphRecipe(INT8, activations=True, smooth=True, rules=(Rule("head", INT4),))
    found = run(recipe, CountingStore(tmp_path / "s")).to_json()
    assert list(found["layers"]) == LAYERS
    gate, head = found["layers"]["gate"], found["layers"]["head"]
    assert (gate["form"], head["form"]) == ("int8", "int4 g32")
    assert 0 < gate["error"] < 0.02 < head["error"] < 0.2
    assert (len(gate["activation_scales"]), len(head["activation_scales"])) == (1, 0)
    assert set(found["exponents"]) == {"gate", "down"}


def attention():
    return parse_graph(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[H,S,4] q, float[H,4,S] k, float[H,S,4] v) => (float[H,S,4] y) {
          s = MatMul(q, k)
          p = Softmax(s)
          y = MatMul(p, v)
        }
        """
    )


def test_attention_alone(tmp_path):
    generator = np.random.default_rng(0)
    shapes = {"q": (2, 5, 4), "k": (2, 4, 5), "v": (2, 5, 4)}
    feeds = [{n: generator.random(shape).astype(np.float32) for n, shape in shapes.items()}]
    recipe = GraphRecipe(attention=True, observer="min-max")
    chosen = run(recipe, CountingStore(tmp_path / "s"), attention(), feeds)
    scores, product = chosen.plan.values()
    largest = [float(np.abs(feeds[0][name]).max()) for name in ("q", "k", "v")]
    np.testing.assert_allclose(
        [*scores.input_scales, product.input_scales[1]], np.array(largest) / 127, rtol=1e-3
    )


def never():
    raise AssertionError("no samples are needed")


def test_rounding_to_nearest_needs_no_samples(tmp_path):
    store = CountingStore(tmp_path / "s")
    quantize_graph(mlp(), GraphRecipe(INT4), store, never)
    assert store.added == LAYERS


def test_a_float_recipe_does_nothing(tmp_path):
    store = CountingStore(tmp_path / "s")
    chosen = quantize_graph(mlp(), GraphRecipe(method="gptq"), store, never)
    assert (dict(chosen.scales), dict(chosen.plan), chosen.steps()) == ({}, {}, [])


class BrokenOffError(Exception):
    """Stands for Ctrl-C."""


def interrupt_at(label):
    def progress(done, total, name):
        if name == label:
            raise BrokenOffError

    return progress


@pytest.mark.parametrize(
    ("recipe", "stop"),
    [
        (GraphRecipe(INT4, "awq+gptq"), "scales before down"),
        (GraphRecipe(INT4, "awq+gptq"), "gate"),
        (GraphRecipe(INT4, "awq+gptq"), "down"),
        (GraphRecipe(INT4, "gptq"), "head"),
        (SMOOTH, "scales before down"),
        (SMOOTH, "down"),
        (GraphRecipe(INT4), "down"),
    ],
)
def test_a_run_that_broke_off_goes_on(recipe, stop, tmp_path):
    """Finished layers are not computed again, and the result is that of one run."""
    whole = run(recipe, CountingStore(tmp_path / "whole"))
    first = CountingStore(tmp_path / "s")
    with pytest.raises(BrokenOffError):
        run(recipe, first, progress=interrupt_at(stop))
    finished = LAYERS[: LAYERS.index(stop)] if stop in LAYERS else []
    assert first.added == finished
    second = CountingStore(tmp_path / "s")
    found = run(recipe, second)
    assert second.added == LAYERS[len(finished) :]
    assert plan_numbers(found) == plan_numbers(whole)
    for name, scales in whole.scales.items():
        np.testing.assert_array_equal(found.scales[name], scales)
    assert found.exponents == whole.exponents
    third = CountingStore(tmp_path / "s")
    again = quantize_graph(mlp(), recipe, third, never, 1)
    assert not third.added
    assert plan_numbers(again) == plan_numbers(whole)


def test_a_damaged_weight_is_made_again(tmp_path):
    recipe = GraphRecipe(INT4, "gptq")
    whole = run(recipe, CountingStore(tmp_path / "s"))
    path = whole.plan["up"].weight.path
    expected = plan_numbers(whole)
    path.write_bytes(path.read_bytes()[:-30])
    store = CountingStore(tmp_path / "s")
    assert plan_numbers(run(recipe, store)) == expected
    assert store.added == ["up"]


@pytest.mark.parametrize("recipe", [GraphRecipe(INT4, "gptq"), GraphRecipe(INT4, "awq"), W8A8])
def test_activations_that_are_not_finite(recipe, tmp_path):
    feeds = inputs(4, 5)
    feeds[1]["x"][2, 3] = np.nan
    with pytest.raises(InputError, match=r"'n'.*(NaN|finite)"):
        run(recipe, CountingStore(tmp_path / "s"), feeds=feeds)


@pytest.mark.parametrize("recipe", [GraphRecipe(INT4), GraphRecipe(INT4, "awq"), SMOOTH])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(recipe, bad, tmp_path):
    up = values_of(mlp().tensors()["up.weight"]).copy()
    up[3, 4] = bad
    with pytest.raises(InputError, match=r"weight of 'up' holds values that are not finite"):
        run(recipe, CountingStore(tmp_path / "s"), graph=mlp(up=up))


def test_no_samples(tmp_path):
    with pytest.raises(InputError, match="no samples"):
        run(GraphRecipe(INT4, "gptq"), CountingStore(tmp_path / "s"), feeds=[])


@pytest.mark.parametrize("method", ["awq+gptq", "rtn"])
def test_one_row_of_one_sample(method, tmp_path):
    chosen = run(GraphRecipe(INT4, method), CountingStore(tmp_path / "s"), feeds=inputs(1))
    assert list(chosen.plan) == LAYERS


@pytest.mark.parametrize("whole_blocks", [True, False])
def test_groups_fit_the_rows(whole_blocks, tmp_path):
    """TensorRT takes no shorter last block: 96 rows get blocks of 32, 64 rows one of 64."""
    recipe = GraphRecipe(WeightFormat(4, 128), "awq+gptq")
    store, feeds = CountingStore(tmp_path / "s"), inputs(20)
    chosen = quantize_graph(mlp(), recipe, store, lambda: feeds, 1, None, whole_blocks)
    sizes = {name: part.weight.form.group_size for name, part in chosen.plan.items()}
    fitting = {"gate": 64, "up": 64, "down": 32, "head": 64}
    assert sizes == (fitting if whole_blocks else dict.fromkeys(LAYERS, 128))
    (found,) = run_exactly(written(mlp(), chosen), feeds)
    assert np.isfinite(found["z"]).all()


def test_forms_that_a_layer_cannot_have_are_refused_at_once(tmp_path):
    """Before any sample is run."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[B,3,8,8] x) => (float[B,4,4,4] y) <float[4,3,2,2] w> {
      y = Conv<strides=[2, 2]>(x, w)
    }
    """
    graph = parse_graph(text, w=np.ones((4, 3, 2, 2), np.float32))
    recipe = GraphRecipe(INT4, "gptq", rules=(Rule("w", INT4),))
    with pytest.raises(InputError, match=r"'w' cannot be stored as int4 g32.*by a rule"):
        quantize_graph(graph, recipe, CountingStore(tmp_path / "s"), never)


def test_a_rule_for_all_does_not_reach_attention(tmp_path):
    """Its products have no weight to store."""
    recipe = GraphRecipe(rules=(Rule("*", INT8),))
    chosen = quantize_graph(attention(), recipe, CountingStore(tmp_path / "s"), never)
    assert not chosen.plan


def test_progress_counts_up(tmp_path):
    seen = []
    run(SMOOTH, CountingStore(tmp_path / "s"), progress=lambda *args: seen.append(args))
    assert seen == [
        (0, 2, "scales before gate"),
        (1, 2, "scales before down"),
        (2, 2, "scales of channels"),
        *((index, 4, name) for index, name in enumerate(LAYERS)),
        (4, 4, "head"),
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_table_of_8_bits_is_read_by_rows_where_onnx_runtime_would_not(dtype, tmp_path):
    recipe = replace(RECIPES["int4"].decoder, method="rtn")
    chosen = quantize(nano(), "decoder", recipe, tmp_path, samples=2)
    facts, options = facts_of(nano().config), PipelineOptions(dtype)
    steps = build_pipeline("decoder", facts, get_target("cpu"), options, chosen.steps())
    ids = IdRange(nano().config.text.vocab_size, rows=True)
    verifier = OrtVerifier({"input_ids": ids}, threads=1)
    records = PassManager(steps, verifier=verifier).run(nano_graph("decoder"))
    (record,) = [r for r in records if r.name == "dequantize-gathered-rows"]
    assert (record.result.rewritten, record.verified) == (1, 0)
