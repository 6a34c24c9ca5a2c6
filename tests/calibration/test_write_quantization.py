"""Quantized layers as Q/DQ: before and expected, the same numbers, fit for the device."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.calibration.write_quantization import (
    BLOCKED_OPSET,
    LayerPlan,
    WriteQuantization,
    form_problem,
)
from mvlm_export.engines.errors import PassError
from mvlm_export.engines.targets import get_target
from mvlm_export.passes.base import Expect, PassManager, Step
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.deferred import values_of
from mvlm_export.passes.graph_io import bind_weight, load_graph, save_graph, to_model
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    random_feeds,
    run_graph,
)

from .nano_models import run_exactly
from .quantized_graphs import (
    ATTENTION,
    CASES,
    CONV,
    EMBEDDING,
    INT4_LINEAR,
    INT8,
    INT8_LINEAR,
    LINEAR,
    SHARED,
    W8A8,
    Case,
    parsed,
    plan_of,
)

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def on_grid(values, scale):
    return (np.rint(values / np.float32(scale)).clip(-128, 127) * np.float32(scale)).astype(
        np.float32
    )


@each_case
def test_before_and_expected(case, tmp_path):
    graph = parsed(case.before)
    plan, _ = plan_of(graph, case, tmp_path)
    result = WriteQuantization(plan).apply(graph)
    assert (result.matched, result.rewritten) == (len(case.plan), len(case.plan))
    expected = parsed(case.after, case.opset)
    assert_same_structure(graph, expected)
    assert graph.opset == case.opset
    onnx.checker.check_model(to_model(graph), full_check=True)


@each_case
@pytest.mark.parametrize("fused", [False, True])
def test_numbers_are_those_of_the_rounded_float_graph(case, fused, tmp_path):
    """With ONNX Runtime's integer kernels too; weights are shifted, so that offsets matter."""
    graph = parsed(case.before)
    plan, rounded = plan_of(graph, case, tmp_path, offset=0.3)
    plain = parsed(case.before)
    for name, values in rounded.items():
        bind_weight(plain, name, values)
    WriteQuantization(plan).apply(graph)
    for rows in (1, 5):
        feeds = random_feeds(graph, {"S": rows}, seed=rows, **case.ranges)
        scales = iter(case.inputs)
        coarse = {
            name: on_grid(values, next(scales)) if case.inputs else values
            for name, values in feeds.items()
        }
        (found,) = run_exactly(graph, [feeds], fused)
        for name, values in run_graph(plain, coarse).items():
            assert_close(found[name], values)


@pytest.mark.parametrize("name", [n for n in CASES if "short-block" not in n])
def test_fit_for_the_device(name, tmp_path):
    """From disk, in float16, for TensorRT 10.3; it takes whole blocks alone."""
    case = CASES[name]
    graph = parsed(case.before)
    WriteQuantization(plan_of(graph, case, tmp_path)[0]).apply(graph)
    ConvertToFloat16().apply(graph)
    save_graph(graph, tmp_path / "model.onnx")
    report = check_conformance(tmp_path / "model.onnx", get_target("orin"))
    report.raise_if_failed()
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


@each_case
def test_float16_leaves_no_weight_in_float32(case, tmp_path):
    graph = parsed(case.before)
    steps = [
        Step(
            WriteQuantization(plan_of(graph, case, tmp_path)[0]), Expect(len(case.plan), "all")
        ),
        Step(ConvertToFloat16()),
    ]
    records = PassManager(steps).run(graph)
    assert not records[1].result.refusals
    dtypes = {t.name: values_of(t).dtype for t in graph.tensors().values() if is_constant(t)}
    assert np.dtype(np.float32) not in dtypes.values()
    inputs = random_feeds(graph, **case.ranges)
    again = load_from(graph, tmp_path)
    for name, values in run_graph(graph, inputs).items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(run_graph(again, inputs)[name], values)


def is_constant(tensor):
    return isinstance(tensor, gs.Constant)


def load_from(graph, folder):
    save_graph(graph, folder / "again.onnx")
    return load_graph(folder / "again.onnx")


def test_an_inputs_pair_stands_before_each_reader_of_its_scale(tmp_path):
    """Two scales on one tensor make two pairs; readers that are not quantized keep x."""
    graph = parsed(SHARED.before)
    plan, _ = plan_of(graph, SHARED, tmp_path)
    plan["v"] = LayerPlan(plan["v"].weight, (0.5,))
    WriteQuantization(plan).apply(graph)
    assert [node.op for node in graph.nodes].count("QuantizeLinear") == 2
    graph = parsed(SHARED.before)
    WriteQuantization({"w": plan["w"]}).apply(graph)
    (left,) = find_layers(graph)
    assert (left.name, left.inputs[0].name) == ("v", "x")


def test_nothing_is_read_before_the_graph_is_written(tmp_path):
    """A weight that is gone from the disk is missed when it is written, by name."""
    graph = parsed(INT4_LINEAR.before)
    plan, _ = plan_of(graph, INT4_LINEAR, tmp_path)
    next((tmp_path / "store").glob("*.npz")).unlink()
    WriteQuantization(plan).apply(graph)
    with pytest.raises(Exception, match=r"w\.npz cannot be read"):
        to_model(graph)


@pytest.mark.parametrize("form", [INT8, WeightFormat(4, 32)], ids=str)
def test_int4_raises_the_opset(form, tmp_path):
    graph = parsed(LINEAR, opset=20)
    case = Case(LINEAR, "", {"w": form})
    WriteQuantization(plan_of(graph, case, tmp_path)[0]).apply(graph)
    assert graph.opset == (BLOCKED_OPSET if form.bits == 4 else 20)
    later = parsed(LINEAR, opset=22)
    WriteQuantization(plan_of(later, case, tmp_path)[0]).apply(later)
    assert later.opset == 22


def test_layers_that_the_graph_lacks():
    plan = {"w": LayerPlan(), "lm_head": LayerPlan(), "model.layers.7.up": LayerPlan()}
    with pytest.raises(
        PassError, match=r"no layers lm_head, model.layers.7.up \(and 2 in all\)"
    ):
        WriteQuantization(plan).apply(parsed(LINEAR))


def refusal(graph, plan):
    result = WriteQuantization(plan).apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert "DequantizeLinear" not in [node.op for node in graph.nodes]
    return result.refusals[0].reason


def test_refusals(tmp_path):
    graph = parsed(LINEAR)
    plan, _ = plan_of(graph, INT8_LINEAR, tmp_path)
    weight = plan["w"].weight
    two = LayerPlan(weight, (0.1, 0.2))
    assert refusal(graph, {"w": two}) == "it has 1 computed operands, not 2"
    assert "not (96, 6)" in refusal(parsed(CONV.before), {"w": LayerPlan(weight)}).replace(
        "what was quantized is", "not"
    )
    assert "its weight is None" in refusal(parsed(ATTENTION.before), {"y": LayerPlan(weight)})


@pytest.mark.parametrize(
    ("case", "form", "reason"),
    [
        (CONV, WeightFormat(4, 32), "convolutions take 8-bit weights alone"),
        (EMBEDDING, WeightFormat(4, 32, False), "linear layers alone take offsets"),
    ],
)
def test_forms_that_a_layer_cannot_have(case, form, reason, tmp_path):
    graph = parsed(case.before)
    name = next(iter(case.plan))
    plan, _ = plan_of(graph, Case(case.before, "", {name: form}), tmp_path)
    (layer,) = find_layers(graph)
    assert reason in form_problem(layer, form)
    assert reason in refusal(graph, plan)


def test_float16_graphs_come_later(tmp_path):
    graph = parsed(LINEAR)
    plan, _ = plan_of(graph, W8A8, tmp_path)
    ConvertToFloat16().apply(graph)
    with pytest.raises(PassError):
        WriteQuantization(plan).apply(graph)
