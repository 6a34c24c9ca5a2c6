"""Attention in small, and what float16 makes of a graph."""

import numpy as np

from mvlm_export.exporter.tolerances import TOLERANCES
from mvlm_export.passes.lowering.convert_to_float16 import ConvertToFloat16
from tests.passes.graphs import (
    random_feeds,
    run_graph,
)

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
FP16 = TOLERANCES["float16"].relative
BEFORE = (
    HEAD
    + """
g (float[S,4] x, bool[S,S] seen) => (float[S,4] y, float[S,6] logits)
  <float[4] n, float[4,4] k, float[4,6] h, float eps, float nil = {0}, float far = {-1e30},
   int64[1] last = {-1}> {
  square = Mul(x, x)
  mean = ReduceMean(square, last)
  safe = Add(mean, eps)
  root = Sqrt(safe)
  inverse = Reciprocal(root)
  normal = Mul(x, inverse)
  scaled = Mul(normal, n)
  keys = MatMul(scaled, k)
  turned = Transpose<perm=[1,0]>(keys)
  scores = MatMul(scaled, turned)
  mask = Where(seen, nil, far)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  mixed = MatMul(weights, keys)
  y = Add(x, mixed)
  logits = MatMul(y, h)
}
"""
)


def weights(dtype=np.float32, **changes):
    generator = np.random.default_rng(0)
    made = {
        "n": generator.standard_normal(4).astype(dtype),
        "k": generator.standard_normal((4, 4)).astype(dtype),
        "h": generator.standard_normal((4, 6)).astype(dtype),
        "eps": np.array(1e-6, np.float32),
    }
    return {**made, **changes}


def no_scalars():
    return {"nil": np.array(0, np.float32), "far": np.array(-1e30, np.float32)}


def relative(found, expected):
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(graph, sizes=None, bound=FP16, **ranges):
    """Convert, and hold the result to the table's float16 bound; outputs by name."""
    rewrite = ConvertToFloat16(keep_io=["logits"])
    before = graph.copy()
    result = rewrite.apply(graph)
    feeds = random_feeds(graph, sizes, **ranges)
    expected = run_graph(before, rewrite.feeds_before(feeds))
    found = run_graph(graph, feeds)
    for name, values in rewrite.outputs_after(expected, feeds).items():
        assert found[name].dtype == values.dtype
        assert relative(found[name], expected[name]) < bound
    assert rewrite.apply(graph.copy()).matched == len(result.refusals)
    return result


def dtypes(graph, op):
    return {str(np.dtype(node.outputs[0].dtype)) for node in graph.nodes if node.op == op}


def casts(graph):
    return [node for node in graph.nodes if node.op == "Cast"]
