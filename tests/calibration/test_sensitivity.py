"""What each layer costs: held against whole graphs with that layer changed."""

from functools import partial

import numpy as np
import pytest

from mvlm_export.calibration.activation_statistics import row_statistics
from mvlm_export.calibration.fisher_estimate import FisherEstimate
from mvlm_export.calibration.layer_rounding import FLOAT, Candidate, input_steps
from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.observers import scale_of
from mvlm_export.calibration.quantize_graph import quantize_graph
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.recipe import GraphRecipe, Rule
from mvlm_export.calibration.sensitivity import Effect, Limits, SensitivityAnalysis
from mvlm_export.calibration.torch_graph import TorchGraph
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.calibration.weight_rounding import round_clipped, round_to_nearest
from mvlm_export.calibration.write_quantization import (
    LayerPlan,
    WriteQuantization,
    weight_matrix,
)
from mvlm_export.engines.errors import InputError, PassError
from mvlm_export.passes.deferred import values_of
from tests.passes.graphs import assert_close, constants, run_graph

from .toy_graphs import (
    constant_of,
    toy_decoder,
    toy_encoder,
    toy_feeds,
    toy_normed,
    toy_pictures,
)

INT4 = Candidate(WeightFormat(4, 32))
INT8 = Candidate(WeightFormat(8))
FULL = Candidate(WeightFormat(8), inputs=True)
PRODUCTS = Candidate(None, inputs=True)


def kl(reference, found):
    """KL of rows of logits in nats, written out once more."""
    reference, found = reference.astype(np.float64), found.astype(np.float64)
    p = np.exp(reference - reference.max(axis=-1, keepdims=True))
    q = np.exp(found - found.max(axis=-1, keepdims=True))
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    return (p * np.log(p / q)).sum(axis=-1)


def square(reference, found):
    return np.array([((reference - found) ** 2).sum()])


def rows_of_answer(place, count):
    """The last rows, another number for each sample."""
    return list(range(count - 2 - place, count))


KL = Effect(lambda place, logits: logits[rows_of_answer(place, len(logits))], kl)
SQUARE = Effect(lambda place, output: output, square)


def analysis_of(graph, feeds=toy_feeds, **given):
    return SensitivityAnalysis(graph, "logits", feeds, KL, threads=1, **given)


def all_candidates(graph, *candidates):
    return {layer.name: candidates for layer in find_layers(graph)}


def replaced(graph, feeds, changes, square_of=None):
    """A copy of a decoder with weights rounded by the rows of the float graph.

    Args:
        changes: form by layer.
    """
    copy = graph.copy()
    for layer in find_layers(graph):
        form = changes.get(layer.name)
        if form is None:
            continue
        matrix = weight_matrix(layer, values_of(layer.weight))
        if layer.kind == "linear" and form.bits == 4:
            seen = graph.copy()
            read = seen.tensors()[layer.inputs[0].name]
            seen.outputs = [read]
            rows = [run_graph(seen.cleanup(), feed)[read.name] for feed in used(seen, feeds)]
            square_of_rows = row_statistics("x", rows).square
            rounded = round_clipped(matrix, form, square_of_rows).dequantize()
        else:
            rounded = round_to_nearest(matrix, form).dequantize()
        shape = tuple(layer.weight.shape)
        values = rounded if layer.kind == "linear" else rounded.T.reshape(shape)
        constant_of(copy, layer.weight.name).values = np.ascontiguousarray(values)
    return copy


def used(graph, feeds):
    names = {tensor.name for tensor in graph.inputs}
    return [{n: v for n, v in feed.items() if n in names} for feed in feeds]


def brute_force(graph, changed, feeds):
    """Mean KL over the rows that count, from two whole runs a sample."""
    found = []
    for place, feed in enumerate(feeds):
        a, b = run_graph(graph, feed)["logits"], run_graph(changed, feed)["logits"]
        rows = rows_of_answer(place, len(a))
        found.append(kl(a[rows], b[rows]))
    return float(np.concatenate(found).mean())


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "store", {"key": 1})


def test_each_loss_is_that_of_the_whole_graph_with_one_layer_changed(store):
    graph, feeds = toy_decoder(), toy_feeds()
    losses = analysis_of(graph).measure(all_candidates(graph, INT4, INT8, FLOAT), store)
    assert list(losses) == [layer.name for layer in find_layers(graph)]
    assert len(losses) == 6
    for name, found in losses.items():
        assert found[FLOAT] == 0.0
        for candidate in (INT4, INT8):
            changed = replaced(graph, feeds, {name: candidate.form})
            expected = brute_force(graph, changed, feeds)
            assert found[candidate] == pytest.approx(expected, rel=2e-3, abs=1e-9)
        assert found[INT4] > 10 * found[INT8] > 0


LIMITS = {
    "a segment for each layer": Limits(segment=1),
    "no room for variants": Limits(segment=40_000, pending=1),
    "both": Limits(segment=1, pending=1),
}


@pytest.mark.parametrize("name", LIMITS)
def test_memory_limits_change_no_figure(store, tmp_path, name):
    graph = toy_decoder()
    wanted = all_candidates(graph, INT4, INT8)
    free = analysis_of(graph).measure(wanted, store)
    tight = analysis_of(graph, limits=LIMITS[name])
    other = WeightStore(tmp_path / "other", {"key": 1})
    found = tight.measure(wanted, other)
    assert {n: dict(v) for n, v in found.items()} == {n: dict(v) for n, v in free.items()}


def test_the_mix_is_that_of_the_whole_graph_with_all_layers_changed():
    graph, feeds = toy_decoder(), toy_feeds()
    names = [layer.name for layer in find_layers(graph)]
    chosen = dict(zip(names, (INT8, INT4, FLOAT, INT4, INT8, INT4), strict=True))
    found = analysis_of(graph).measure_mix(chosen)
    changed = replaced(graph, feeds, {name: c.form for name, c in chosen.items()})
    assert found == pytest.approx(brute_force(graph, changed, feeds), rel=2e-3)
    assert analysis_of(graph).compare(changed) == pytest.approx(found, rel=2e-3)


def test_a_mix_of_one_layer_is_that_layer_alone(store):
    graph = toy_decoder()
    analysis = analysis_of(graph)
    losses = analysis.measure({"model.layers.0.up": (INT4,)}, store)
    alone = losses["model.layers.0.up"][INT4]
    assert analysis.measure_mix({"model.layers.0.up": INT4}) == pytest.approx(alone, rel=1e-6)


def test_a_mix_of_floats_loses_nothing():
    graph = toy_decoder()
    analysis = analysis_of(graph)
    assert analysis.measure_mix({}) == 0.0
    assert analysis.measure_mix({"lm_head": FLOAT}) == 0.0
    assert analysis.compare(graph.copy()) == 0.0


def test_small_errors_of_layers_add_up(store):
    """The assumption behind every prediction, where it should hold."""
    graph = toy_decoder()
    feeds = partial(toy_feeds, 24)
    analysis = analysis_of(graph, feeds)
    losses = analysis.measure(all_candidates(graph, INT4), store)
    predicted = sum(found[INT4] for found in losses.values())
    measured = analysis.measure_mix(dict.fromkeys(losses, INT4))
    assert measured == pytest.approx(predicted, rel=0.25)


def test_the_graph_is_left_as_it_was(store):
    graph = toy_decoder()
    before, nodes = constants(graph), list(graph.nodes)
    readers = {t.name: list(t.outputs) for t in graph.tensors().values()}
    analysis = analysis_of(graph)
    analysis.measure(all_candidates(graph, INT4), store)
    analysis.measure_mix({"lm_head": INT4})
    assert list(graph.nodes) == nodes
    assert {t.name: list(t.outputs) for t in graph.tensors().values()} == readers
    for name, values in constants(graph).items():
        np.testing.assert_array_equal(values, before[name])


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_ended(store):
    graph = toy_decoder()
    wanted = all_candidates(graph, INT4, INT8)
    whole = WeightStore(store.folder.with_name("whole"), {})
    runs = []
    expected = analysis_of(graph, progress=lambda *a: runs.append(a)).measure(wanted, whole)

    def stop_late(done, total, label):
        if label.startswith("model.layers.1.up"):
            raise Stop

    limits = Limits(segment=1, pending=1)  # so that figures come early
    with pytest.raises(Stop):
        analysis_of(graph, progress=stop_late, limits=limits).measure(wanted, store)
    kept = sorted(path.name for path in store.folder.glob("loss-*.json"))
    assert len(kept) == 3
    again = []
    found = analysis_of(graph, progress=lambda *a: again.append(a)).measure(wanted, store)
    assert {n: dict(v) for n, v in found.items()} == {n: dict(v) for n, v in expected.items()}
    assert len(again) < len(runs) / 2
    assert not any(label.startswith("model.layers.0") for _, _, label in again)


def test_known_figures_need_no_run_and_others_are_kept(store):
    graph = toy_decoder()
    expected = analysis_of(graph).measure(all_candidates(graph, INT4), store)

    def refuse():
        raise AssertionError("nothing is left to run")

    assert analysis_of(graph, refuse).measure(all_candidates(graph, INT4), store) == expected
    analysis_of(graph).measure({"lm_head": (INT8,)}, store)
    assert analysis_of(graph, refuse).measure(all_candidates(graph, INT4), store) == expected


def test_progress_counts_up_to_its_total(store):
    graph, calls = toy_decoder(), []
    analysis = analysis_of(graph, progress=lambda *a: calls.append(a))
    analysis.measure(all_candidates(graph, INT4, INT8), store)
    counted = [(done, total) for done, total, label in calls if "int" in label]
    assert counted == [(n, 42) for n in range(1, 43)]  # 2 * (6 + 5 + ... + 1)


def test_inputs_and_weights_of_8_bits_are_those_that_are_written(store, tmp_path):
    """Convolution, products and attention: against the graph with their Q/DQ."""
    graph, feeds = toy_encoder(), toy_pictures()
    layers = find_layers(graph)
    assert [layer.kind for layer in layers] == [
        "conv",
        "linear",
        "linear",
        "attention",
        "linear",
        "attention",
    ]
    wanted = {
        layer.name: (PRODUCTS if layer.kind == "attention" else FULL,) for layer in layers
    }
    analysis = SensitivityAnalysis(graph, "features", toy_pictures, SQUARE, threads=1)
    losses = analysis.measure(wanted, store)
    weights = WeightStore(tmp_path / "weights", {})
    for layer in layers:
        seen = graph.copy()
        seen.outputs += [seen.tensors()[t.name] for t in layer.inputs if t.name != "pixels"]
        values = [run_graph(seen, feed) | feed for feed in feeds]
        scales = [
            float(scale_of(max(float(np.abs(v[t.name]).max()) for v in values)))
            for t in layer.inputs
        ]
        weight = None
        if layer.weight is not None:
            matrix = weight_matrix(layer, values_of(layer.weight))
            rounded = round_to_nearest(matrix, WeightFormat(8))
            weight = weights.add(layer.name, rounded, matrix)
        changed = graph.copy()
        plan = {layer.name: LayerPlan(weight, tuple(scales))}
        assert WriteQuantization(plan).apply(changed).rewritten == 1
        expected = np.mean(
            [
                square(run_graph(graph, f)["features"], run_graph(changed, f)["features"])
                for f in feeds
            ]
        )
        (found,) = losses[layer.name].values()
        assert found == pytest.approx(float(expected), rel=1e-3)


AS_RECIPE = {
    "GPTQ alone, no place for scales": (toy_decoder, "model.layers.1.down", "awq+gptq"),
    "scales of channels": (toy_normed, "lm_head", "awq"),
    "both": (toy_normed, "lm_head", "awq+gptq"),
    "neither": (toy_normed, "lm_head", "rtn"),
}


@pytest.mark.parametrize("case", AS_RECIPE)
def test_a_layer_is_rounded_as_its_recipe_would(store, tmp_path, case):
    """Held against the graph that a recipe gives which quantizes this layer alone."""
    make, name, method = AS_RECIPE[case]
    graph = make()
    feeds = used(graph, toy_feeds(6))
    recipe = GraphRecipe(method=method, rules=(Rule(name, INT4.form),))
    weights = WeightStore(tmp_path / "weights", {})
    chosen = quantize_graph(graph.copy(), recipe, weights, lambda: feeds, threads=1)
    assert bool(chosen.scales) == (make is toy_normed and method != "rtn")
    written = graph.copy()
    for step in chosen.steps():
        step.rewrite.apply(written)
    analysis = analysis_of(graph, lambda: feeds, rounding=method)
    found = analysis.measure({name: (INT4,)}, store)[name][INT4]
    assert found == pytest.approx(analysis.compare(written), rel=1e-3)
    plain = analysis_of(graph, lambda: feeds).measure_mix({name: INT4})
    assert (found < plain) == (method != "rtn")


def test_bad_input_is_refused(store):
    graph = toy_decoder()
    with pytest.raises(InputError, match=r"no output 'logit'.*logits, last"):
        SensitivityAnalysis(graph, "logit", toy_feeds, KL)
    with pytest.raises(InputError, match="no layers lm_tail"):
        analysis_of(graph).measure({"lm_tail": (INT4,)}, store)
    with pytest.raises(InputError, match="no samples"):
        analysis_of(graph, list).measure({"lm_head": (INT4,)}, store)
    with pytest.raises(InputError, match="no samples"):
        analysis_of(graph, list).measure_mix({"lm_head": INT4})


def test_weights_and_activations_that_are_not_finite_are_named(store):
    graph = toy_decoder()
    constant_of(graph, "model.layers.1.up.weight").values[3, 3] = np.nan
    with pytest.raises(InputError, match=r"'model\.layers\.1\.up'.*not finite"):
        analysis_of(graph).measure({"model.layers.1.up": (INT8,)}, store)
    with pytest.raises(InputError, match="not finite"):
        analysis_of(graph).measure({"model.layers.1.down": (INT4,)}, store)


def test_steps_of_operands_reach_to_their_largest_value():
    values = [[np.array([1.0, -12.7]), np.array([3.0])], [np.array([0.5])]]
    found = input_steps(values, ["a", "b"])
    np.testing.assert_allclose(found, [0.1, 0.5 / 127], rtol=1e-3)


# Estimates


def test_the_torch_graph_gives_what_onnx_runtime_gives():
    graph = toy_decoder()
    for feed in toy_feeds():
        expected = run_graph(graph, feed)
        logits, last = TorchGraph(graph).run(feed)
        assert_close(logits.numpy(), expected["logits"])
        assert_close(last.numpy(), expected["last"])


def test_estimates_are_the_losses_of_small_changes(store, tmp_path):
    graph = toy_decoder()
    feeds = toy_feeds(40)
    wanted = all_candidates(graph, INT8, INT4, FLOAT)
    measured = analysis_of(graph, lambda: feeds).measure(wanted, store)
    estimate = FisherEstimate(graph, "logits", rows_of_answer, threads=1)
    found = estimate.run(wanted, feeds, tmp_path / "changes")
    assert list(found) == list(measured)
    for name, losses in found.items():
        assert losses[FLOAT] == 0.0
        for candidate in (INT8, INT4):
            assert losses[candidate] == pytest.approx(measured[name][candidate], rel=0.3)
    assert not list((tmp_path / "changes").iterdir())


def test_estimates_do_not_depend_on_chance(tmp_path):
    graph, feeds = toy_decoder(), toy_feeds()
    wanted = all_candidates(graph, INT8)
    first, second = (
        FisherEstimate(graph, "logits", rows_of_answer, threads=1).run(wanted, feeds, tmp_path)
        for _ in range(2)
    )
    for name, losses in first.items():
        assert second[name][INT8] == pytest.approx(losses[INT8], rel=1e-5)


def test_estimates_of_quantized_inputs_are_refused(tmp_path):
    graph = toy_decoder()
    estimate = FisherEstimate(graph, "logits", rows_of_answer)
    with pytest.raises(InputError, match="lm_head"):
        estimate.run({"lm_head": (FULL,)}, toy_feeds(), tmp_path)


def test_an_operator_without_a_gradient_is_named():
    with pytest.raises(PassError, match=r"Conv.*leave --estimate out"):
        TorchGraph(toy_encoder())
