"""The cache of GroupQueryAttention in 8 bits: its wiring, its numbers, what is left alone."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mvlm_export.engines.targets import get_target
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.graph_io import to_model
from mvlm_export.passes.lowering.quantize_kv_cache import (
    QuantizeKvCache,
    dequantize_rows,
    quantize_rows,
)
from mvlm_export.passes.lowering.use_group_query_attention import UseGroupQueryAttention
from tests.ort_versions import NEEDS_INT8_CACHE
from tests.passes.graphs import assert_same_structure, parse_graph, random_feeds, run_graph
from tests.passes.lowering.append_form import MAX, append_form, in_half

KEY, VALUE = "present.0.key", "present.0.value"
SCALES = {KEY: 0.031, VALUE: 0.05}

BEFORE = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[1,S,64] q, float[1,S,64] k, float[1,S,64] v, int32[1] last, int32 total,
   float[1,4,32,16] past_key, float[1,4,32,16] past_value)
  => (float[1,S,64] y, float[1,4,32,16] present_key, float[1,4,32,16] present_value)
  <float[32,8] cos, float[32,8] sin> {
  y, present_key, present_value = com.microsoft.GroupQueryAttention
    <num_heads=4, kv_num_heads=4, do_rotary=1, scale=0.25>
    (q, k, v, past_key, past_value, last, total, cos, sin)
}
"""
EXPECTED = [
    ("float[1,4,32,16]", "int8[1,4,32,16]"),
    (
        "<float[32,8] cos",
        "<float[1] k_scale = {0.031}, float[1] v_scale = {0.05}, float[32,8] cos",
    ),
    ("cos, sin)\n", 'cos, sin, "", "", "", k_scale, v_scale)\n'),
    (
        "scale=0.25>",
        'scale=0.25, k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR", '
        "kv_cache_bit_width=8>",
    ),
]


def operator(*changes, angle=0.4):
    """The operator alone; every position turns keys by ``angle``."""
    text = BEFORE
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    table = np.full((MAX, 8), angle, np.float32)
    return parse_graph(text, cos=np.cos(table), sin=np.sin(table))


def named_scales(graph):
    """By the names that a parsed graph has."""
    return dict(zip((t.name for t in graph.outputs[1:3]), SCALES.values(), strict=True))


def test_before_and_expected():
    graph = operator()
    rewrite = QuantizeKvCache(named_scales(graph))
    result = rewrite.apply(graph)
    assert (result.matched, result.rewritten) == (1, 1)
    assert_same_structure(graph, operator(*EXPECTED))
    onnx.checker.check_model(to_model(graph), full_check=True)
    assert check_conformance(to_model(graph), get_target("cpu")).ok


def lowered(half=False, kv_heads=4):
    graph = append_form(kv_heads=kv_heads)
    graph = in_half(graph) if half else graph
    assert UseGroupQueryAttention(MAX).apply(graph).rewritten == 1
    return graph


@NEEDS_INT8_CACHE
@pytest.mark.parametrize(("past", "new"), [(0, 5), (7, 5), (7, 1), (31, 1)])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_attention_works_with_the_rows_that_are_stored(half, past, new):
    """Codes are the float rows rounded, and the answer is that of a cache of those numbers."""
    graph = lowered(half, kv_heads=2)
    before = graph.copy()
    rewrite = QuantizeKvCache(SCALES)
    assert rewrite.apply(graph).rewritten == 1
    feeds = random_feeds(graph, {"S": new}, input_ids=300)
    generator = np.random.default_rng(past)
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        feeds[name] = generator.integers(-128, 128, feeds[name].shape).astype(np.int8)
    feeds["past_length"][:] = past
    floats = rewrite.feeds_before(feeds)
    assert floats["past_key_values.0.key"].dtype == (np.float16 if half else np.float32)
    given = run_graph(before, floats)
    found, expected = run_graph(graph, feeds), rewrite.outputs_after(given, feeds)
    assert found.keys() == expected.keys()
    for name in SCALES:
        assert found[name].dtype == expected[name].dtype == np.int8
        steps = found[name].astype(int) - expected[name]
        assert np.abs(steps).max() <= 1, "more than a code that rounding turned over"
        assert (steps != 0).mean() < 0.01
        rows = found[name][0, :, past : past + new]
        assert len(np.unique(rows)) > 20, "the scale leaves nothing to compare"
        np.testing.assert_array_equal(
            found[name][0, :, :past], feeds_of(feeds, name)[:, :past]
        )
    # The new rows too are read back from codes: half a code each, over sums of weights of 1.
    bound = max(SCALES.values()) * 2
    np.testing.assert_allclose(found["y"], given["y"], atol=bound)
    assert np.abs(found["y"] - given["y"]).max() > 0


def feeds_of(feeds, present):
    return feeds[present.replace("present", "past_key_values")][0]


@NEEDS_INT8_CACHE
def test_all_but_the_scale_is_exact():
    """With keys and values that are on the grid, and not turned off it, nothing is lost."""
    graph = operator(angle=0)
    before = graph.copy()
    scales = named_scales(graph)
    rewrite = QuantizeKvCache(scales)
    rewrite.apply(graph)
    generator = np.random.default_rng(3)
    feeds = random_feeds(graph, {"S": 3})
    for name, scale in zip(("k", "v"), scales.values(), strict=True):
        codes = generator.integers(-127, 128, (1, 3, 64))
        feeds[name] = (codes * np.float32(scale)).astype(np.float32)
    for tensor in graph.inputs:
        if tensor.dtype == np.int8:
            feeds[tensor.name] = generator.integers(-127, 128, tensor.shape).astype(np.int8)
    feeds["last"] = np.array([9], np.int32)
    feeds["total"] = np.array(10, np.int32)
    floats = dict(feeds)
    for tensor, scale in zip(graph.inputs[-2:], scales.values(), strict=True):
        floats[tensor.name] = dequantize_rows(feeds[tensor.name], scale)
    wanted, found = run_graph(before, floats), run_graph(graph, feeds)
    np.testing.assert_allclose(found["y"], wanted["y"], rtol=1e-4, atol=1e-5)


@NEEDS_INT8_CACHE
def test_values_beyond_the_grid_are_put_on_its_end():
    graph = lowered()
    rewrite = QuantizeKvCache({KEY: 0.001, VALUE: 0.001})
    rewrite.apply(graph)
    feeds = random_feeds(graph, {"S": 4}, input_ids=300)
    feeds["past_length"][:] = 0
    found = run_graph(graph, feeds)[VALUE][0, :, :4]
    assert found.min() <= -127
    assert found.max() == 127
    large = np.abs(feeds["v"].reshape(4, 4, 16).transpose(1, 0, 2)) > 0.2
    assert (np.abs(found[large].astype(int)) >= 127).all(), "nothing wraps round"


def test_a_second_run_leaves_it_alone():
    graph = lowered()
    QuantizeKvCache(SCALES).apply(graph)
    result = QuantizeKvCache(SCALES).apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert "quantized already" in result.refusals[0].reason


REFUSALS = {
    "no scale": ({VALUE: 0.1}, [], "no scale for"),
    "past computed": (
        None,
        [
            ("  y, present", "  moved = Relu(past_key)\n  y, present"),
            ("v, past_key,", "v, moved,"),
        ],
        "is not this operator's alone",
    ),
    "past read": (
        None,
        [
            ("present_value)\n  <", "present_value, float[1,4,32,16] z)\n  <"),
            ("cos, sin)\n", "cos, sin)\n  z = Relu(past_key)\n"),
        ],
        "is not this operator's alone",
    ),
    "present read": (
        None,
        [
            ("present_value)\n  <", "present_value, float[1,4,32,16] z)\n  <"),
            ("cos, sin)\n", "cos, sin)\n  z = Relu(present_key)\n"),
        ],
        "is read by others",
    ),
    "no cache": (
        None,
        [
            (", float[1,4,32,16] present_key, float[1,4,32,16] present_value)", ")"),
            ("y, present_key, present_value =", "y ="),
        ],
        "no cache of its own",
    ),
}


@pytest.mark.parametrize(
    ("scales", "changes", "reason"), REFUSALS.values(), ids=list(REFUSALS)
)
def test_refusals(scales, changes, reason):
    graph = operator(*changes)
    names = [t.name for t in graph.outputs[1:3]]
    scales = dict.fromkeys(names, 0.1) if scales is None else scales
    before = to_model(graph).SerializeToString()
    result = QuantizeKvCache(scales).apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason
    assert to_model(graph).SerializeToString() == before


@settings(deadline=None, max_examples=60)
@given(
    rows=arrays(np.float32, (3, 2, 4), elements=st.floats(-50, 50, width=32)),
    scale=st.floats(2**-10, 4, width=16),
)
def test_codes_are_the_nearest(rows, scale):
    codes = quantize_rows(rows, scale)
    assert codes.dtype == np.int8
    inside = np.clip(rows, -128 * scale, 127 * scale)
    found = dequantize_rows(codes, scale)
    assert found.dtype == np.float32
    assert np.abs(found - inside).max() <= scale * (0.5 + 1e-4)
