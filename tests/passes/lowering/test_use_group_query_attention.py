"""Rotary embedding, cache and attention in ONNX Runtime's one operator."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_export.engines.targets import get_target
from mvlm_export.passes.conformance import check_conformance
from mvlm_export.passes.deferred import is_deferred
from mvlm_export.passes.graph_io import to_model
from mvlm_export.passes.lowering.use_group_query_attention import UseGroupQueryAttention
from mvlm_export.passes.transformer.merge_qkv import MergeQkv
from tests.passes.graphs import (
    assert_close,
    assert_same_structure,
    constants,
    nano_config,
    nano_graph,
    parse_graph,
    random_feeds,
    run_graph,
    tiny_graph,
)
from tests.passes.lowering.append_form import (
    MAX,
    NAMES,
    REFUSALS,
    SCALE_IN_WEIGHT,
    SIGN_IN_TABLE,
    SOFTMAX_BEHIND_CASTS,
    append_form,
    compare_forms,
    in_half,
    tables,
)

EXPECTED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (int32[S] input_ids, float[S,64] q, float[S,32] k, float[S,32] v, int64[1] past_length,
   float[1,2,32,16] past_key, float[1,2,32,16] past_value)
  => (float[S,64] y, float[1,2,32,16] present_key, float[1,2,32,16] present_value)
  <float[32,8] cos, float[32,8] sin, int64 zero = {0}, int64 none = {0}, int64 one = {1},
   int64[1] first = {0}, int32[1] one_less = {1},
   int64[3] by_head = {-1, 4, 16}, int64[3] by_kv_head = {-1, 2, 16}, int64[2] flat = {-1, 64},
   int64[3] wide = {1, -1, 64}, int64[3] narrow = {1, -1, 32}> {
  s_1 = Shape<start=0, end=1>(input_ids)
  s = Squeeze(s_1)
  t = Squeeze(past_length)
  new = Range(zero, s, one)
  positions = Add(new, t)
  new_length = Shape<start=0, end=1>(positions)
  filled = Add(past_length, new_length)
  total_1 = Cast<to=6>(filled)
  last = Sub(total_1, one_less)
  total = Squeeze(total_1, first)
  q_heads = Reshape<allowzero=1>(q, by_head)
  k_heads = Reshape<allowzero=1>(k, by_kv_head)
  v_heads = Reshape<allowzero=1>(v, by_kv_head)
  q_flat = Reshape(q_heads, wide)
  k_flat = Reshape(k_heads, narrow)
  v_flat = Reshape(v_heads, narrow)
  attended, present_key, present_value = com.microsoft.GroupQueryAttention
    <num_heads=4, kv_num_heads=2, do_rotary=1, scale=0.25>
    (q_flat, k_flat, v_flat, past_key, past_value, last, total, cos, sin)
  heads = Reshape(attended, by_head)
  y = Reshape<allowzero=1>(heads, flat)
}
"""


def test_before_and_expected():
    graph = append_form(kv_heads=2)
    result = compare_forms(UseGroupQueryAttention(MAX), graph, past=7, new=5)
    assert (result.matched, result.rewritten) == (1, 1)
    halves = {name: values[:, :8] for name, values in tables().items()}
    expected = parse_graph(EXPECTED, **halves)
    for tensor in expected.tensors().values():
        tensor.name = NAMES.get(tensor.name, tensor.name)
    assert_same_structure(graph, expected)
    onnx.checker.check_model(to_model(graph), full_check=True)
    assert check_conformance(to_model(graph), get_target("cpu")).ok


def packed(order="q, k, v", sizes=(64, 32, 32), *changes):
    """The layer behind one product of query, key and value, as ``merge-qkv`` leaves it."""
    names = order.split(", ")
    parts = f"int64[{len(sizes)}] parts = {{{', '.join(map(str, sizes))}}}"
    return append_form(
        ("float[S,64] q, float[S,32] k, float[S,32] v", f"float[S,{sum(sizes)}] qkv"),
        ("float scale = {0.25}>", f"float scale = {{0.25}}, {parts}>"),
        ("  s_1 =", f"  {', '.join(names)} = Split<axis=-1>(qkv, parts)\n  s_1 ="),
        *changes,
        kv_heads=2,
    )


PACKED = [
    ("float[S,64] q, float[S,32] k, float[S,32] v", "float[S,128] qkv"),
    (
        "int64[3] wide = {1, -1, 64}, int64[3] narrow = {1, -1, 32}",
        "int64[3] all = {1, -1, 128}",
    ),
    ("  q_heads = Reshape<allowzero=1>(q, by_head)\n", ""),
    ("  k_heads = Reshape<allowzero=1>(k, by_kv_head)\n", ""),
    ("  v_heads = Reshape<allowzero=1>(v, by_kv_head)\n", ""),
    ("  q_flat = Reshape(q_heads, wide)\n", "  rows = Reshape(qkv, all)\n"),
    ("  k_flat = Reshape(k_heads, narrow)\n", ""),
    ("  v_flat = Reshape(v_heads, narrow)\n", ""),
    (", int64[3] by_kv_head = {-1, 2, 16}", ""),
    ("(q_flat, k_flat, v_flat, past", '(rows, "", "", past'),
]


def test_one_product_is_taken_whole():
    graph = packed()
    result = compare_forms(UseGroupQueryAttention(MAX), graph, past=7, new=5)
    assert (result.matched, result.rewritten) == (1, 1)
    text = EXPECTED
    for old, new in PACKED:
        assert old in text, old
        text = text.replace(old, new)
    halves = {name: values[:, :8] for name, values in tables().items()}
    expected = parse_graph(text, **halves)
    for tensor in expected.tensors().values():
        tensor.name = NAMES.get(tensor.name, tensor.name)
    assert_same_structure(graph, expected)
    onnx.checker.check_model(to_model(graph), full_check=True)
    assert check_conformance(to_model(graph), get_target("cpu")).ok


APART = {
    "other order": (("k, q, v", (32, 64, 32)), ()),
    "keys and values swapped": (("q, v, k", (64, 32, 32)), ()),
    "a fourth part": (("q, k, v, rest", (64, 32, 32, 16)), ()),
    "something between": (
        ("q, k, v", (64, 32, 32)),
        [
            ("v, by_kv_head)\n  key_rows", "moved, by_kv_head)\n  key_rows"),
            ("  present_value =", "  moved = Relu(v)\n  present_value ="),
        ],
    ),
}


@pytest.mark.parametrize(("parts", "changes"), APART.values(), ids=list(APART))
def test_other_parts_stay_three_inputs(parts, changes):
    graph = packed(*parts, *changes)
    assert compare_forms(UseGroupQueryAttention(MAX), graph, 7, 5).rewritten == 1
    (attention,) = [node for node in graph.nodes if node.op == "GroupQueryAttention"]
    assert not any(tensor.is_empty() for tensor in attention.inputs)
    assert "Split" in [node.op for node in graph.nodes]


def test_parts_that_are_read_elsewhere_too_stay():
    changes = ("  present_value =", "  z = Relu(v)\n  present_value =")
    graph = packed("q, k, v", (64, 32, 32), changes)
    assert compare_forms(UseGroupQueryAttention(MAX), graph, 7, 5).rewritten == 1
    assert "Split" in [node.op for node in graph.nodes]


@pytest.mark.parametrize("changes", [[], SIGN_IN_TABLE], ids=["plain", "sign in the table"])
def test_half_of_each_table_is_written(changes):
    given_tables = tables()
    if changes:
        given_tables["sin"][:, :8] *= -1
    graph = append_form(*changes, **given_tables)
    assert compare_forms(UseGroupQueryAttention(MAX), graph, 3, 4).rewritten == 1
    written = constants(graph)
    np.testing.assert_array_equal(written["cos.half"], tables()["cos"][:, :8])
    np.testing.assert_array_equal(written["sin.half"], tables()["sin"][:, :8])


def test_past_and_present_may_share_memory():
    graph = append_form(kv_heads=2)
    before = graph.copy()
    rewrite = UseGroupQueryAttention(MAX)
    rewrite.apply(graph)
    session = onnxruntime.InferenceSession(
        to_model(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = random_feeds(graph, {"S": 5})
    feeds["past_length"][:] = 7
    expected = run_graph(before, rewrite.feeds_before(feeds))
    binding, caches = session.io_binding(), {}
    binding.bind_output("y")
    for name, values in feeds.items():
        if name.startswith("past_key_values"):
            present = name.replace("past_key_values", "present")
            caches[present] = onnxruntime.OrtValue.ortvalue_from_numpy(values.copy())
            binding.bind_ortvalue_input(name, caches[present])
            binding.bind_ortvalue_output(present, caches[present])
        else:
            binding.bind_cpu_input(name, values)
    session.run_with_iobinding(binding)
    assert_close(binding.copy_outputs_to_cpu()[0], expected["y"])
    for present, cache in caches.items():
        past, rows = feeds[present.replace("present", "past_key_values")], expected[present]
        assert_close(cache.numpy()[0, :, 7:12].transpose(1, 0, 2), rows)
        np.testing.assert_array_equal(cache.numpy()[:, :, :7], past[:, :, :7])
        np.testing.assert_array_equal(cache.numpy()[:, :, 12:], past[:, :, 12:])


SWAPPED = ("Concat<axis=-1>(k_neg, k1)", "Concat<axis=-1>(k1, k_neg)")
OTHER_TABLE = ("k_sin = Mul(k_turned, sin_heads)", "k_sin = Mul(k_turned, cos_heads)")
NOT_ROTATED = {
    "halves swapped": ([SWAPPED], "'present.0.key' is not rotated by a rotary embedding"),
    "other angles": ([OTHER_TABLE], "'q_rotated' and 'present.0.key' have other angles"),
    "from row 0": (
        [("Gather<axis=0>(cos, positions)", "Gather<axis=0>(cos, new)")],
        "'q_rotated' is not rotated by its position from row T on",
    ),
    "computed table": (
        [("cos_rows = Gather<axis=0>(cos,", "c = Abs(cos)\n  cos_rows = Gather<axis=0>(c,")],
        "'q_rotated' is not rotated by constant tables",
    ),
    "turned apart": (SIGN_IN_TABLE[1:], "are turned in opposite directions by 'sin'"),
    "scale 0": ([("scale = {0.25}", "scale = {0}")], "'q_rotated' are scaled by 0"),
    "double": ([("float", "double")], "'q_rotated' is float64"),
}


@pytest.mark.parametrize(
    "case", (REFUSALS | NOT_ROTATED).values(), ids=list(REFUSALS | NOT_ROTATED)
)
def test_refusals(case):
    changes, reason = case
    double = {name: v.astype(np.float64) for name, v in tables().items()}
    graph = append_form(*changes, **double if "float64" in reason else {})
    result = UseGroupQueryAttention(MAX).apply(graph)
    assert (result.matched, result.rewritten) == (1, 0)
    assert reason in result.refusals[0].reason


def only_refusal(graph, capacity=MAX):
    (refusal,) = UseGroupQueryAttention(capacity).apply(graph).refusals
    return refusal.reason


@pytest.mark.parametrize("name", ["cos", "sin"])
def test_a_table_of_two_halves(name):
    odd = tables()[name]
    odd[MAX - 1, 3] += 1e-3
    reason = only_refusal(append_form(**{name: odd}))
    assert reason == f"the halves of the table {name!r} differ"


def test_a_sign_in_the_table_and_in_the_graph():
    sine = tables()["sin"]
    sine[:, :8] *= -1
    assert "the halves of the table 'sin' differ" in only_refusal(append_form(sin=sine))


def test_a_table_shorter_than_the_cache():
    assert "the table 'cos' has 32 rows for 33" in only_refusal(append_form(), MAX + 1)


def test_a_head_that_the_kernel_does_not_take():
    assert "head_dim is 8, ONNX Runtime takes" in only_refusal(append_form(head_dim=8))


@settings(deadline=None, max_examples=25)
@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([16, 32, 48]),
    past=st.integers(0, 20),
    new=st.integers(1, 12),
    folded=st.booleans(),
)
def test_any_size(kv_heads, head_dim, past, new, folded):
    changes = SCALE_IN_WEIGHT if folded else []
    graph = append_form(*changes, kv_heads=kv_heads, head_dim=head_dim)
    assert compare_forms(UseGroupQueryAttention(MAX), graph, past, new).rewritten == 1


@pytest.mark.parametrize(("past", "new"), [(0, 9), (7, 5), (7, 1)])
def test_half_precision(past, new):
    graph = in_half(append_form())
    rewrite = UseGroupQueryAttention(MAX)
    assert compare_forms(rewrite, graph, past, new, rtol=4e-3).rewritten == 1


def test_softmax_behind_casts():
    graph = append_form(*SOFTMAX_BEHIND_CASTS)
    assert compare_forms(UseGroupQueryAttention(MAX), graph, 7, 5).rewritten == 1


@pytest.mark.parametrize(("past", "new"), [(0, 9), (11, 1), (6, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_captured_decoder(kv_heads, past, new):
    graph = tiny_graph("decoder", num_key_value_heads=kv_heads)
    assert compare_forms(UseGroupQueryAttention(256), graph, past, new).rewritten == 2


def test_nano():
    text, graph = nano_config().text, nano_graph("decoder")
    rewrite = UseGroupQueryAttention(text.max_position_embeddings)
    assert compare_forms(rewrite, graph, 20, 7).rewritten == text.num_hidden_layers
    left = {node.op for node in graph.nodes}
    assert not left & {"Softmax", "Concat", "Split", "Neg", "Transpose", "LessOrEqual"}
    assert is_deferred(graph.tensors()["rotary_cos.half"])


@pytest.mark.parametrize(("past", "new"), [(0, 9), (11, 1), (6, 5)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_captured_decoder_with_merged_projections(kv_heads, past, new):
    graph = tiny_graph("decoder", num_key_value_heads=kv_heads)
    assert MergeQkv().apply(graph).rewritten == 2
    assert compare_forms(UseGroupQueryAttention(256), graph, past, new).rewritten == 2
    assert "Split" not in [node.op for node in graph.nodes]
