"""A product of 8-bit codes in one operator of ONNX Runtime, its weights of 7 bits.

    y = DQ(Q(x, s), s) DQ(W, t) + b
      = com.microsoft.MatMulIntegerToFloat(Q'(x, s), W', s, t', 128, 0, b)

Q' gives uint8 codes with the zero point 128, which are Q's int8 codes moved by 128: the same
numbers. Weights are rounded once more, to codes of -64 to 64:

    W' = round(W 64 / 127),   t' = t 127 / 64

x86 CPUs without VNNI add two products of 8 bits in 16 signed bits, which saturate
(``vpmaddubsw``): 255 * 127 * 2 is beyond 32767, 255 * 64 * 2 = 32640 is not. With
``session.x64quantprecision`` ONNX Runtime makes weights that reach beyond 64 unsigned, whose
kernel is a quarter slower, and leaves others as they are. So the faster kernel runs on every
CPU, and its sums are exact. The bias is added by the operator too, not in a pass of its own.

(ContribOperators.md and ``avx2_weight_s8_to_u8.cc`` of ONNX Runtime.)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.targets import ORT_DOMAIN

from ..base import Pass, PassResult, Tally, numpy_dtype
from ..deferred import Array, derive, values_of
from ..editing import consumers, fresh_name, insert_node, is_graph_output, replace_tensor
from ..matching import Match, any_, constant_problem, find_matches, is_op, op

LARGEST = 64
"""Codes of weights reach so far: two products with 255 fit into 16 signed bits."""

_GIVEN = 127
_ZERO_POINT = np.array(128, np.uint8)
_INT8 = np.dtype(np.int8)
_CODES = op(
    "QuantizeLinear", any_("x"), any_("step"), any_("zero"), bind="quantize", exact=True
)
_ROUNDED = op(
    "DequantizeLinear", _CODES, any_("step"), any_("zero"), bind="dequantize", exact=True
)
_WEIGHT = op("DequantizeLinear", any_("codes"), any_("scales"), bind="weight")
_PATTERN = op("MatMul", _ROUNDED, _WEIGHT, bind="product")


class UseIntegerMatMul(Pass):
    """``MatMul(DQ(Q(x)), DQ(int8))``, and a bias behind it, to ``MatMulIntegerToFloat``."""

    name = "use-integer-matmul"
    summary = "8-bit products become ONNX Runtime's one operator, weights of 7 bits"
    opsets = range(13, 25)
    rounding = "integers"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        quantized: dict[int, gs.Variable] = {}
        for match in find_matches(graph, _PATTERN):
            problem = _problem(graph, match)
            if problem is None:
                _replace(graph, match, quantized)
                tally.rewrote()
            else:
                tally.refuse(match.nodes[0], problem)
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    return _activation_problem(match) or _weight_problem(graph, match)


def _activation_problem(match: Match) -> str | None:
    x, step, zero = match["x"], match["step"], match["zero"]
    if np.dtype(numpy_dtype(x)) != np.dtype(np.float32):
        return f"{x.name!r} is {np.dtype(numpy_dtype(x))}, and the operator gives float32"
    for tensor in (step, zero):
        if not isinstance(tensor, gs.Constant) or values_of(tensor).size != 1:
            return f"{tensor.name!r} is not one constant number for the whole of {x.name!r}"
    if zero.dtype != _INT8 or values_of(zero).any():
        return f"the zero point {zero.name!r} is not 0 of int8"
    return None


def _weight_problem(graph: gs.Graph, match: Match) -> str | None:
    node, codes, scales = match["weight"], match["codes"], match["scales"]
    for tensor in (codes, scales):
        shared = constant_problem(graph, tensor, node)
        if shared is not None:
            return shared
    if codes.dtype != _INT8 or len(codes.shape) != 2:
        found = f"{codes.dtype} {list(codes.shape)}"
        return f"the weight {codes.name!r} is {found}, not a matrix of int8"
    if node.attrs.get("block_size") or list(scales.shape) != [codes.shape[1]]:
        return f"{scales.name!r} has no scale for each column of {codes.name!r}"
    if node.attrs.get("axis", 1) not in (1, -1):
        return f"the scales of {codes.name!r} do not lie along its columns"
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        zero = node.inputs[2]
        if not isinstance(zero, gs.Constant) or values_of(zero).any():
            return f"the zero point {zero.name!r} is not 0"
    made = node.outputs[0]
    if is_graph_output(graph, made) or any(n is not match["product"] for n in consumers(made)):
        return f"{made.name!r} is also read elsewhere"
    return None


def _replace(graph: gs.Graph, match: Match, quantized: dict[int, gs.Variable]) -> None:
    node = match["quantize"]
    if id(node) not in quantized:
        quantized[id(node)] = insert_node(
            graph,
            "QuantizeLinear",
            [match["x"], match["step"], _ZERO_POINT],
            match["x"],
            dtype=np.dtype(np.uint8),
            stem=f"{match['x'].name}.uint8",
        )
    codes, scales = match["codes"], match["scales"]
    columns = codes.shape[1]
    narrow = derive(fresh_name(graph, f"{codes.name}.narrow"), [codes], _narrow, codes.shape)
    wider = derive(fresh_name(graph, f"{scales.name}.wider"), [scales], _widen, scales.shape)
    name = fresh_name(graph, f"{codes.name}.no_offsets")
    zeros = gs.Constant(name, np.zeros(columns, np.int8))
    biased, bias = _biased(graph, match.root, columns)
    inputs = [quantized[id(node)], narrow, match["step"], wider, _ZERO_POINT, zeros]
    product = insert_node(
        graph,
        "MatMulIntegerToFloat",
        inputs if bias is None else [*inputs, bias],
        biased,
        stem=f"{match['product'].name or match.root.name}.integer",
        domain=ORT_DOMAIN,
    )
    replace_tensor(graph, biased, product)


def _narrow(codes: Array) -> Array:
    scaled = np.rint(codes.astype(np.float32) * (LARGEST / _GIVEN))
    narrow: Array = np.clip(scaled, -LARGEST, LARGEST).astype(np.int8)
    return narrow


def _widen(scales: Array) -> Array:
    wider: Array = scales * np.float32(_GIVEN / LARGEST)
    return wider


def _biased(
    graph: gs.Graph, product: gs.Tensor, columns: int
) -> tuple[gs.Tensor, gs.Constant | None]:
    """The product behind its bias, and the bias; or the product alone."""
    readers = consumers(product)
    if len(readers) != 1 or not is_op(readers[0], "Add") or is_graph_output(graph, product):
        return product, None
    for tensor in readers[0].inputs:
        if isinstance(tensor, gs.Constant) and list(tensor.shape) == [columns]:
            return readers[0].outputs[0], tensor
    return product, None
