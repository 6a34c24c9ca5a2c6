"""One decoder layer's attention in the append form, as captured, for tests of its lowering."""

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.passes.deferred import values_of
from mvlm_export.passes.type_inference import infer_types
from tests.passes.graphs import assert_close, parse_graph, random_feeds, run_graph

H, D, MAX = 4, 16, 32

NAMES = {
    "past_key": "past_key_values.0.key",
    "past_value": "past_key_values.0.value",
    "past_other": "past_key_values.1.key",
    "present_key": "present.0.key",
    "present_value": "present.0.value",
}

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
g (int32[S] input_ids, float[S,HD] q, float[S,KD] k, float[S,KD] v,
   float[T,K,D] past_key, float[T,K,D] past_value)
  => (float[S,HD] y, float[S,K,D] present_key, float[S,K,D] present_value)
  <float[MAX,D] cos, float[MAX,D] sin,
   int64 zero = {0}, int64 one = {1}, int64[1] last = {-1}, int64[1] middle = {-2},
   int64[3] by_head = {-1, H, D}, int64[3] by_kv_head = {-1, K, D}, int64[2] flat = {-1, HD},
   float visible = {0}, float hidden = {-1e30}, float scale = {0.25}> {
  s_1 = Shape<start=0, end=1>(input_ids)
  s = Squeeze(s_1)
  t_1 = Shape<start=0, end=1>(past_value)
  t = Squeeze(t_1)
  total = Add(t, s)
  new = Range(zero, s, one)
  positions = Add(new, t)
  keys = Range(zero, total, one)
  column = Unsqueeze(positions, last)
  le = LessOrEqual(keys, column)
  mask = Where(le, visible, hidden)
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
  present_key = Add(k_cos, k_sin)
  present_value = Reshape<allowzero=1>(v, by_kv_head)
  key_rows = Concat<axis=-3>(past_key, present_key)
  value_rows = Concat<axis=-3>(past_value, present_value)
  REPEAT
  query_t = Transpose<perm=[1,0,2]>(query)
  key_t = Transpose<perm=[1,2,0]>(KEYS)
  scores = MatMul(query_t, key_t)
  masked = Add(scores, mask)
  weights = Softmax<axis=-1>(masked)
  value_t = Transpose<perm=[1,0,2]>(VALUES)
  mixed = MatMul(weights, value_t)
  heads = Transpose<perm=[1,0,2]>(mixed)
  y = Reshape<allowzero=1>(heads, flat)
}
"""

# Head k of each row is read by H / K heads of the query in turn.
REPEAT = """
  key_wide = Unsqueeze(key_rows, middle)
  key_many = Expand(key_wide, repeats)
  keys_all = Reshape<allowzero=1>(key_many, by_head)
  value_wide = Unsqueeze(value_rows, middle)
  value_many = Expand(value_wide, repeats)
  values_all = Reshape<allowzero=1>(value_many, by_head)
"""


def tables(seed=0, head_dim=D):
    """Cosines and sines of random angles, each twice in a row."""
    angles = np.random.default_rng(seed).uniform(0, 6.3, (MAX, head_dim // 2))
    angles = np.concatenate([angles, angles], 1)
    return {f.__name__: f(angles).astype(np.float32) for f in (np.cos, np.sin)}


def append_form(*changes, kv_heads=H, head_dim=D, **weights):
    """The layer; ``changes`` are (old, new) pairs in its text, the sizes already filled in."""
    text, parts = TEXT, ("key_rows", "value_rows")
    if kv_heads != H:
        repeats = f"int64[4] repeats = {{1, {kv_heads}, {H // kv_heads}, {head_dim}}}, "
        text = text.replace("<float[MAX", f"<{repeats}float[MAX")
        parts = ("keys_all", "values_all")
    text = text.replace("REPEAT", REPEAT if kv_heads != H else "")
    sizes = {"KEYS": parts[0], "VALUES": parts[1], "HD": H * head_dim, "MAX": MAX}
    sizes |= {"KD": kv_heads * head_dim, "K,": f"{kv_heads},", "H,": f"{H},"}
    sizes |= {"D]": f"{head_dim}]", "D}": f"{head_dim}}}"}
    for name, size in sizes.items():
        text = text.replace(name, str(size))
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    if " z = " in text:
        text = text.replace("present_value)\n  <", "present_value, float[] z)\n  <")
    graph = parse_graph(text, **tables(head_dim=head_dim) | weights)
    for tensor in graph.tensors().values():
        tensor.name = NAMES.get(tensor.name, tensor.name)
    return graph


def in_half(graph):
    """The graph in FP16."""
    for tensor in graph.tensors().values():
        if tensor.dtype == np.float32 and isinstance(tensor, gs.Constant):
            clipped = np.clip(values_of(tensor), -60000, 60000)
            tensor.values = np.asarray(clipped, np.float16)
        elif tensor.dtype == np.float32:
            tensor.dtype = np.dtype(np.float16)
    infer_types(graph)
    return graph


def compare_forms(rewrite, graph, past, new, rtol=1e-5):
    """Apply a pass to the fixed form, and hold it to the numbers of the append form.

    The rows of the cache behind the filled ones hold noise.
    """
    before = graph.copy()
    result = rewrite.apply(graph)
    feeds = random_feeds(graph, {"S": new}, input_ids=300)
    feeds["past_length"][:] = past
    feeds_before = rewrite.feeds_before(feeds)
    assert feeds_before["past_key_values.0.key"].shape[0] == past
    expected = rewrite.outputs_after(run_graph(before, feeds_before), feeds)
    found = run_graph(graph, feeds)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(found[name], values, rtol)
    assert rewrite.apply(graph.copy()).matched == 0, "a second run must find nothing to do"
    return result


SIGN_IN_TABLE = [
    ("Concat<axis=-1>(q_neg, q1)", "Concat<axis=-1>(q2, q1)"),
    ("Concat<axis=-1>(k_neg, k1)", "Concat<axis=-1>(k2, k1)"),
]
SCALE_IN_WEIGHT = [("<perm=[1,0,2]>(query)", "<perm=[1,0,2]>(q_rotated)")]
SOFTMAX_BEHIND_CASTS = [
    ("masked = Add(scores, mask)", "wide = Cast<to=1>(scores)\n  masked = Add(wide, mask)"),
    ("mixed = MatMul(weights,", "narrow = Cast<to=1>(weights)\n  mixed = MatMul(narrow,"),
]
KEYS = "key_rows = Concat<axis=-3>(past_key, present_key)"

# Name: changes of the text, and what the refusal says.
REFUSALS = {
    "past computed": (
        [(KEYS, "moved = Relu(past_key)\n  key_rows = Concat<axis=-3>(moved, present_key)")],
        "the past 'moved' is not an input",
    ),
    "rows kept": (
        [(KEYS, "copy = Relu(present_key)\n  key_rows = Concat<axis=-3>(past_key, copy)")],
        "the new rows 'copy' are not an output",
    ),
    "permutation": (
        [("heads = Transpose<perm=[1,0,2]>", "heads = Transpose<perm=[1,2,0]>")],
        "permutes by [1, 2, 0], not [1, 0, 2]",
    ),
    "softmax axis": ([("Softmax<axis=-1>", "Softmax<axis=1>")], "is not over the keys"),
    "weak mask": ([("-1e30", "-1")], "is not 0 where visible and -10000 or less"),
    "shifted mask": ([("visible = {0}", "visible = {1}")], "is not 0 where visible"),
    "computed mask": (
        [
            (
                "mask = Where(le, visible, hidden)",
                "w = Where(le, visible, hidden)\n  mask = Abs(w)",
            )
        ],
        "the mask 'mask' is not made by Where",
    ),
    "keys from 1": (
        [("keys = Range(zero, total, one)", "keys = Range(one, total, one)")],
        "does not count the keys from 0 to T + S",
    ),
    "positions from S": ([("Add(new, t)", "Add(new, s)")], "is not causal from row T on"),
    "scores read": (
        [("masked = Add(scores, mask)", "masked = Add(scores, mask)\n  z = Relu(scores)")],
        "'scores' inside it is also read by Relu",
    ),
    "past read": (
        [(KEYS, KEYS + "\n  z = Relu(past_key)")],
        "past_key_values.0.key' is also read",
    ),
    "rows given": (
        [("present_value)\n  <", "present_value, int64[1] t_1)\n  <")],
        "'t_1', the rows of 'past_key_values.0.value', is an output of the graph",
    ),
    "other past": (
        [("past_value)\n  =>", "past_value, float[T,4,16] past_other)\n  =>")],
        "no attention was found for the past 'past_key_values.1.key'",
    ),
}
