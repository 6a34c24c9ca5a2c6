"""The cache scattered in place, and read by Attention."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.engines.errors import PassError
from mvlm_export.engines.targets import get_target
from mvlm_export.engines.trt_builder import ProfileSpec, build_engine
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.graph_io import save_graph, to_model
from mvlm_export.passes.lowering.use_tensor_scatter import UseTensorScatter
from tests.passes.graphs import (
    assert_same_structure,
    constants,
    nano_config,
    nano_graph,
    parse_graph,
    tiny_graph,
)
from tests.passes.lowering.append_form import (
    MAX,
    NAMES,
    REFUSALS,
    SCALE_IN_WEIGHT,
    SOFTMAX_BEHIND_CASTS,
    append_form,
    compare_forms,
    in_half,
    tables,
)

EXPECTED = """
<ir_version: 10, opset_import: ["" : 24]>
g (int32[S] input_ids, float[S,64] q, float[S,32] k, float[S,32] v, int64[1] past_length,
   float[1,2,32,16] past_key, float[1,2,32,16] past_value)
  => (float[S,64] y, float[1,2,32,16] present_key, float[1,2,32,16] present_value)
  <float[32,16] cos, float[32,16] sin,
   int64 zero = {0}, int64 one = {1}, int64[1] middle = {-2}, int64[1] first = {0},
   int64[3] by_head = {-1, 4, 16}, int64[3] by_kv_head = {-1, 2, 16}, int64[2] flat = {-1, 64},
   int64[3] around = {0, 1, 3}, float scale = {0.25}, int64[1,1,1,32] rows> {
  s_1 = Shape<start=0, end=1>(input_ids)
  s = Squeeze(s_1)
  t = Squeeze(past_length)
  new = Range(zero, s, one)
  positions = Add(new, t)
  cos_rows = Gather<axis=0>(cos, positions)
  cos_heads = Unsqueeze(cos_rows, middle)
  sin_rows = Gather<axis=0>(sin, positions)
  sin_heads = Unsqueeze(sin_rows, middle)
  q_heads = Reshape<allowzero=1>(q, by_head)
  q1, q2 = Split<axis=2, num_outputs=2>(q_heads)
  q_cos = Mul(q_heads, cos_heads)
  q_neg = Neg(q2)
  q_turned = Concat<axis=-1>(q_neg, q1)
  q_sin = Mul(q_turned, sin_heads)
  q_rotated = Add(q_cos, q_sin)
  query = Mul(q_rotated, scale)
  k_heads = Reshape<allowzero=1>(k, by_kv_head)
  k1, k2 = Split<axis=2, num_outputs=2>(k_heads)
  k_cos = Mul(k_heads, cos_heads)
  k_neg = Neg(k2)
  k_turned = Concat<axis=-1>(k_neg, k1)
  k_sin = Mul(k_turned, sin_heads)
  key = Add(k_cos, k_sin)
  value = Reshape<allowzero=1>(v, by_kv_head)
  column = Unsqueeze(positions, around)
  visible = LessOrEqual(rows, column)
  q_1 = Unsqueeze(query, first)
  q_t = Transpose<perm=[0,2,1,3]>(q_1)
  k_1 = Unsqueeze(key, first)
  k_t = Transpose<perm=[0,2,1,3]>(k_1)
  present_key = TensorScatter<axis=-2, mode="linear">(past_key, k_t, past_length)
  v_1 = Unsqueeze(value, first)
  v_t = Transpose<perm=[0,2,1,3]>(v_1)
  present_value = TensorScatter<axis=-2, mode="linear">(past_value, v_t, past_length)
  attended = Attention<scale=1.0>(q_t, present_key, present_value, visible)
  attended_t = Transpose<perm=[0,2,1,3]>(attended)
  heads = Squeeze(attended_t, first)
  y = Reshape<allowzero=1>(heads, flat)
}
"""


def test_before_and_expected():
    graph = append_form(kv_heads=2)
    result = compare_forms(UseTensorScatter(MAX), graph, past=7, new=5)
    assert (result.matched, result.rewritten) == (1, 1)
    rows = np.arange(MAX).reshape(1, 1, 1, MAX)
    expected = parse_graph(EXPECTED, rows=rows, **tables())
    for tensor in expected.tensors().values():
        tensor.name = NAMES.get(tensor.name, tensor.name)
    assert_same_structure(graph, expected)
    assert [(t.name, t.shape) for t in graph.inputs[4:6]] == [
        ("past_length", [1]),
        ("past_key_values.0.key", [1, 2, MAX, 16]),
    ]


def test_each_row_of_the_cache_has_its_number():
    graph = append_form()
    UseTensorScatter(MAX).apply(graph)
    (rows,) = [v for v in constants(graph).values() if v.shape == (1, 1, 1, MAX)]
    np.testing.assert_array_equal(rows.ravel(), np.arange(MAX))


def test_the_whole_graph_is_of_opset_24():
    graph = append_form()
    before = graph.copy()
    UseTensorScatter(MAX).apply(graph)
    model = to_model(graph)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    assert to_model(before).opset_import[0].version == 20, "a copy keeps its own"
    assert check_conformance(model, get_target("orin", 7)).ok
    assert not check_conformance(model, get_target("orin", 6)).ok


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_refusals(case):
    changes, reason = case
    graph = append_form(*changes)
    result = UseTensorScatter(MAX).apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason
    assert graph.opset == 20


def test_heads_that_are_repeated_in_another_order():
    changes = [
        ("int64[1] last = {-1}", "int64[1] last = {-1}, int64[1] blocks = {1}"),
        ("Unsqueeze(key_rows, middle)", "Unsqueeze(key_rows, blocks)"),
    ]
    (refusal,) = UseTensorScatter(MAX).apply(append_form(*changes, kv_heads=2)).refusals
    assert "the heads of 'present.0.key' are not repeated one by one" in refusal.reason


def test_an_operator_that_opset_24_changes():
    graph = append_form()
    graph.nodes.append(gs.Node("Resize", "enlarge", {}, [], []))
    with pytest.raises(PassError, match="Resize 'enlarge' means something else in opset 24"):
        UseTensorScatter(MAX).apply(graph)


def test_one_layer_that_keeps_its_cache_keeps_all():
    graph = tiny_graph("decoder")
    softmax = [node for node in graph.nodes if node.op == "Softmax"][-1]
    softmax.attrs["axis"] = 1
    result = UseTensorScatter(256).apply(graph)
    assert (result.matched, result.rewritten) == (2, 0)
    reasons = [refusal.reason for refusal in result.refusals]
    assert "keeps its cache, and all have one form" in reasons[0]
    assert "is not over the keys" in reasons[1]


def test_no_capacity():
    with pytest.raises(PassError, match="0 rows"):
        UseTensorScatter(0)


@settings(deadline=None, max_examples=25)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 8, 16, 24]),
    past=st.integers(0, 20),
    new=st.integers(1, 12),
    folded=st.booleans(),
)
def test_any_size(kv_heads, head_dim, past, new, folded):
    changes = SCALE_IN_WEIGHT if folded else []
    graph = append_form(*changes, kv_heads=kv_heads, head_dim=head_dim)
    assert compare_forms(UseTensorScatter(MAX), graph, past, new).rewritten == 1


def test_half_precision():
    graph = in_half(append_form())
    assert compare_forms(UseTensorScatter(MAX), graph, 7, 5, rtol=4e-3).rewritten == 1


def test_softmax_behind_casts():
    graph = append_form(*SOFTMAX_BEHIND_CASTS)
    assert compare_forms(UseTensorScatter(MAX), graph, 7, 5).rewritten == 1


@pytest.mark.parametrize(("past", "new"), [(0, 9), (11, 1), (6, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_captured_decoder(kv_heads, past, new):
    graph = tiny_graph("decoder", num_key_value_heads=kv_heads)
    assert compare_forms(UseTensorScatter(256), graph, past, new).rewritten == 2


def test_nano():
    text, graph = nano_config().text, nano_graph("decoder")
    rewrite = UseTensorScatter(text.max_position_embeddings)
    assert compare_forms(rewrite, graph, 20, 7).rewritten == text.num_hidden_layers
    assert {"Softmax", "Range", "Concat"} & {node.op for node in graph.nodes} == {
        "Concat",
        "Range",
    }


@pytest.mark.parametrize("new", [(1, 1, 1), (1, 1, 2), (1, 8, 16)], ids=str)
def test_tensorrt_builds_it(tmp_path, new):
    pytest.importorskip("tensorrt_rtx")
    graph = in_half(append_form(kv_heads=2, head_dim=64))
    UseTensorScatter(MAX).apply(graph)
    save_graph(graph, tmp_path / "model.onnx")
    plan = tmp_path / "model.plan"
    profile = ProfileSpec("only", {"S": new})
    build_engine(tmp_path / "model.onnx", plan, [profile], target=get_target("rtx"))
    assert plan.stat().st_size > 10_000
