"""Layers of every kind as text, before they are quantized and after."""

import re
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from mvlm_export.calibration.layers import find_layers
from mvlm_export.calibration.quantized_weight import WeightStore
from mvlm_export.calibration.weight_grids import WeightFormat
from mvlm_export.calibration.weight_rounding import round_to_nearest
from mvlm_export.calibration.write_quantization import LayerPlan, weight_matrix
from mvlm_export.passes.deferred import DeferredValues, values_of
from mvlm_export.passes.graph_io import bind_weight
from tests.passes.graphs import parse_graph

HEAD = '<ir_version: 10, opset_import: ["" : OPSET]>\n'
LINEAR = HEAD + "g (float[S,96] x) => (float[S,6] y) <float[96,6] w> { y = MatMul(x, w) }"
INT8 = WeightFormat(8)


@dataclass(frozen=True)
class Case:
    """A graph before, with the numbers that it must give, and what it must become."""

    before: str
    after: str
    plan: dict[str, WeightFormat | None]
    inputs: tuple[float, ...] = ()
    ranges: dict[str, int] = field(default_factory=dict)

    @property
    def opset(self):
        return 21 if "block_size" in self.after else 20


INT8_LINEAR = Case(
    LINEAR,
    HEAD
    + """
    g (float[S,96] x) => (float[S,6] y) <int8[96,6] q, float[6] s, int8[6] o> {
      w = DequantizeLinear<axis=1>(q, s, o)
      y = MatMul(x, w)
    }
    """,
    {"w": INT8},
)
W8A8 = Case(
    LINEAR,
    HEAD
    + """
    g (float[S,96] x) => (float[S,6] y) <float c, int8 z = {0}, int8[96,6] q, float[6] s,
       int8[6] o> {
      i = QuantizeLinear(x, c, z)
      r = DequantizeLinear(i, c, z)
      w = DequantizeLinear<axis=1>(q, s, o)
      y = MatMul(r, w)
    }
    """,
    {"w": INT8},
    (0.02,),
)
INT4_LINEAR = Case(
    LINEAR,
    HEAD
    + """
    g (float[S,96] x) => (float[S,6] y) <int4[96,6] q, float[3,6] s> {
      w = DequantizeLinear<axis=0, block_size=32>(q, s)
      y = MatMul(x, w)
    }
    """,
    {"w": WeightFormat(4, 32)},
)
SHORT_BLOCK = Case(
    LINEAR,
    INT4_LINEAR.after.replace("[3,6]", "[2,6]").replace("=32", "=64"),
    {"w": WeightFormat(4, 64)},
)
ASYMMETRIC = Case(
    HEAD + "g (float[B,S,64] x) => (float[B,S,6] y) <float[64,6] w> { y = MatMul(x, w) }",
    HEAD
    + """
    g (float[B,S,64] x) => (float[B,S,6] y) <int4[64,6] q, float[2,6] s, float[2,6] m,
       int64[4] split = {0, 0, 2, 32}, int64[1] last = {-1}> {
      w = DequantizeLinear<axis=0, block_size=32>(q, s)
      p = MatMul(x, w)
      b = Reshape(x, split)
      t = ReduceSum<keepdims=0>(b, last)
      c = MatMul(t, m)
      y = Add(p, c)
    }
    """,
    {"w": WeightFormat(4, 32, symmetric=False)},
)
ASYMMETRIC_SHORT = Case(
    LINEAR,
    HEAD
    + """
    g (float[S,96] x) => (float[S,6] y) <int4[96,6] q, float[2,6] s, float[2,6] m,
       int64[4] ends = {0, 0, 0, 32}, int64[3] split = {0, 2, 64}, int64[1] last = {-1}> {
      w = DequantizeLinear<axis=0, block_size=64>(q, s)
      p = MatMul(x, w)
      f = Pad(x, ends)
      b = Reshape(f, split)
      t = ReduceSum<keepdims=0>(b, last)
      c = MatMul(t, m)
      y = Add(p, c)
    }
    """,
    {"w": WeightFormat(4, 64, symmetric=False)},
)
CONV = Case(
    HEAD
    + """
    g (float[B,3,8,8] x) => (float[B,4,4,4] y) <float[4,3,2,2] w, float[4] bias> {
      y = Conv<strides=[2, 2]>(x, w, bias)
    }
    """,
    HEAD
    + """
    g (float[B,3,8,8] x) => (float[B,4,4,4] y)
    <float c, int8 z = {0}, int8[4,3,2,2] q, float[4] s, int8[4] o, float[4] bias> {
      i = QuantizeLinear(x, c, z)
      r = DequantizeLinear(i, c, z)
      w = DequantizeLinear<axis=0>(q, s, o)
      y = Conv<strides=[2, 2]>(r, w, bias)
    }
    """,
    {"w": INT8},
    (0.03,),
)
EMBEDDING = Case(
    HEAD
    + "g (int64[S] ids) => (float[S,64] y) <float[9,64] embed> { y = Gather(embed, ids) }",
    HEAD
    + """
    g (int64[S] ids) => (float[S,64] y) <int8[9,64] q, float[9] s, int8[9] o> {
      t = DequantizeLinear<axis=0>(q, s, o)
      y = Gather(t, ids)
    }
    """,
    {"embed": INT8},
    ranges={"ids": 9},
)
EMBEDDING4 = Case(
    EMBEDDING.before,
    HEAD
    + """
    g (int64[S] ids) => (float[S,64] y) <int4[9,64] q, float[9,2] s> {
      t = DequantizeLinear<axis=1, block_size=32>(q, s)
      y = Gather(t, ids)
    }
    """,
    {"embed": WeightFormat(4, 32)},
    ranges={"ids": 9},
)
ATTENTION = Case(
    HEAD + "g (float[H,S,4] q, float[H,4,T] k) => (float[H,S,T] y) { y = MatMul(q, k) }",
    HEAD
    + """
    g (float[H,S,4] q, float[H,4,T] k) => (float[H,S,T] y)
    <float c, float d, int8 z = {0}, int8 o = {0}> {
      i = QuantizeLinear(q, c, z)
      r = DequantizeLinear(i, c, z)
      j = QuantizeLinear(k, d, o)
      l = DequantizeLinear(j, d, o)
      y = MatMul(r, l)
    }
    """,
    {"y": None},
    (0.02, 0.03),
)
SHARED = Case(
    HEAD
    + """
    g (float[S,96] x) => (float[S,6] y, float[S,2] u) <float[96,6] w, float[96,2] v> {
      y = MatMul(x, w)
      u = MatMul(x, v)
    }
    """,
    HEAD
    + """
    g (float[S,96] x) => (float[S,6] y, float[S,2] u)
    <float c, int8 z = {0}, int8[96,6] q, float[6] s, int8[6] o, int8[96,2] h, float[2] t,
     int8[2] n> {
      i = QuantizeLinear(x, c, z)
      r = DequantizeLinear(i, c, z)
      w = DequantizeLinear<axis=1>(q, s, o)
      v = DequantizeLinear<axis=1>(h, t, n)
      y = MatMul(r, w)
      u = MatMul(r, v)
    }
    """,
    {"w": INT8, "v": INT8},
    (0.02,),
)
CASES = {
    "int8": INT8_LINEAR,
    "w8a8": W8A8,
    "int4": INT4_LINEAR,
    "int4-short-block": SHORT_BLOCK,
    "int4-asym": ASYMMETRIC,
    "int4-asym-short-block": ASYMMETRIC_SHORT,
    "conv": CONV,
    "embedding": EMBEDDING,
    "embedding-int4": EMBEDDING4,
    "attention": ATTENTION,
    "shared-input": SHARED,
}


def parsed(text, opset=20, seed=0):
    """A graph with a little of everything in its constants, and int4 where it says so."""
    generator = np.random.default_rng(seed)
    header = text.split("=>")[1].split("{\n")[0] if "{\n" in text else text.split("=>")[1]
    declared = re.findall(
        r"(float|int8|int4)(\[[0-9,]+\])? (\w+)(?=[,>])", header.split("<", 1)[-1]
    )
    weights = {}
    for dtype, shape, name in declared:
        sizes = [int(size) for size in shape.strip("[]").split(",") if size]
        values = generator.standard_normal(sizes) * (name not in ("o", "n"))
        weights[name] = np.asarray(values, np.float32 if dtype == "float" else np.int8)
    graph = parse_graph(text.replace("OPSET", str(opset)).replace("int4[", "int8["), **weights)
    for dtype, _, name in declared:
        if dtype == "int4":
            codes = weights[name].astype(ml_dtypes.int4)
            bind_weight(
                graph,
                name,
                DeferredValues(codes.shape, codes.dtype, lambda codes=codes: codes),
            )
    return graph


def plan_of(graph, case, folder, offset=0.0):
    """Layers rounded to nearest and kept on disk; also their matrices on the grid."""
    store = WeightStore(folder / "store", {})
    plan, rounded = {}, {}
    for layer in find_layers(graph):
        if layer.name not in case.plan:
            continue
        form, stored = case.plan[layer.name], None
        if form is not None:
            matrix = weight_matrix(layer, values_of(layer.weight) + np.float32(offset))
            stored = store.add(layer.name, round_to_nearest(matrix, form), matrix)
            values = stored.load().dequantize()
            shape = tuple(layer.weight.shape)
            rounded[layer.name] = values if layer.kind == "linear" else values.T.reshape(shape)
        plan[layer.name] = LayerPlan(stored, case.inputs)
    return plan, rounded
