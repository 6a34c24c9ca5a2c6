"""A product with a 4-bit weight in one operator of ONNX Runtime.

    y[n] = sum over k of x[k] q[k, n] s[k / b, n]
         = MatMul(x, DequantizeLinear(q, s, axis=0, block_size=b))
         = com.microsoft.MatMulNBits(x, B, S),   S[n, k / b] = s[k / b, n]

where B [N, K/b, b/2] holds q + 8 of column n, two values a byte, the earlier one in the low
bits; the operator subtracts its default zero point 8 again. The numbers are those of the
DequantizeLinear form up to the order of summation, with ``accuracy_level`` 0 or 1; with 4 the
activations too are rounded, to 8 bits a block. (ContribOperators.md of ONNX Runtime.)

ONNX Runtime makes the same of the DequantizeLinear form when it loads a graph, but with
``accuracy_level`` 4 unless its session is told otherwise, and only where its graph rewrites
are on; else it dequantizes the whole weight in each run. Here the file makes the choice.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.engines.targets import ORT_DOMAIN

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive, values_of
from ..editing import fresh_name, insert_node, replace_tensor
from ..matching import Match, any_, constant_problem, find_matches, op

LEVELS = {0: "unset", 1: "float32", 2: "float16", 3: "bfloat16", 4: "int8"}
"""Least accuracy of the activations by ``accuracy_level``."""
INT8 = 4
"""The level of 8-bit activations."""

_INT4 = np.dtype(ml_dtypes.int4)
_ZERO_POINT = 8
_BLOCKS = (16, 32, 64, 128, 256)
"""What ONNX Runtime's kernel takes."""

_WEIGHT = op("DequantizeLinear", any_("quantized"), any_("scales"), bind="dequantize")
_PATTERN = op("MatMul", any_("x"), _WEIGHT)


class UseMatMulNBits(Pass):
    """``MatMul(x, DequantizeLinear(int4))`` to ``MatMulNBits``.

    Args:
        accuracy_level: how far ONNX Runtime may round activations; one of ``LEVELS``.
    """

    name = "use-matmul-nbits"
    summary = "products with 4-bit weights read them packed"
    opsets = range(13, 25)  # below 21 there are no 4-bit weights, so nothing to match

    def __init__(self, accuracy_level: int = 0) -> None:
        if accuracy_level not in LEVELS:
            known = ", ".join(f"{level} ({title})" for level, title in LEVELS.items())
            raise PassError(
                f"There is no accuracy_level {accuracy_level}; give one of {known}."
            )
        self.accuracy_level = accuracy_level
        self.rounding = "integers" if accuracy_level == INT8 else None

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            problem = _problem(graph, match)
            if problem is None:
                self._replace(graph, match)
                tally.rewrote()
            else:
                tally.refuse(match.nodes[0], problem)
        return tally.result()

    def _replace(self, graph: gs.Graph, match: Match) -> None:
        quantized, scales = match["quantized"], match["scales"]
        block = int(match["dequantize"].attrs["block_size"])
        rows, columns = quantized.shape
        shape = [columns, rows // block, block // 2]
        name = fresh_name(graph, f"{quantized.name}.packed")
        packed = derive(name, [quantized], _packer(block), shape, np.uint8)
        name = fresh_name(graph, f"{scales.name}.by_column")
        turned = derive(name, [scales], np.transpose, scales.shape[::-1])
        attrs = {"K": rows, "N": columns, "bits": 4, "block_size": block}
        attrs["accuracy_level"] = self.accuracy_level
        product = insert_node(
            graph,
            "MatMulNBits",
            [match["x"], packed, turned],
            match.root,
            attrs=attrs,
            stem=f"{match.nodes[0].name}_nbits",
            domain=ORT_DOMAIN,
        )
        replace_tensor(graph, match.root, product)


def _packer(block: int) -> Callable[[Array], Array]:
    def pack(quantized: Array) -> Array:
        rows, columns = quantized.shape
        shifted = (quantized.astype(np.int8) + _ZERO_POINT).astype(np.uint8)
        pairs = shifted.T.reshape(columns, rows // block, block // 2, 2)
        packed: Array = pairs[..., 0] | (pairs[..., 1] << 4)
        return packed

    return pack


def _problem(graph: gs.Graph, match: Match) -> str | None:
    node, quantized, scales = match["dequantize"], match["quantized"], match["scales"]
    for weight in (quantized, scales):
        shared = constant_problem(graph, weight, node)
        if shared is not None:
            return shared
    if quantized.dtype != _INT4:
        return f"the weight {quantized.name!r} is {quantized.dtype}, not int4"
    if len(quantized.shape) != 2 or node.attrs.get("axis", 1) not in (0, -2):
        return f"the blocks of {quantized.name!r} do not lie along its rows"
    return (
        _block_problem(quantized, node.attrs.get("block_size", 0))
        or zero_point_problem(node)
        or match.used_elsewhere(graph)
    )


def _block_problem(quantized: gs.Constant, block: int) -> str | None:
    if block not in _BLOCKS:
        known = ", ".join(map(str, _BLOCKS))
        return f"{quantized.name!r} has blocks of {block}, not one of {known}"
    if quantized.shape[0] % block:
        return f"the {quantized.shape[0]} rows of {quantized.name!r} are no blocks of {block}"
    return None


def zero_point_problem(node: gs.Node) -> str | None:
    """Why the zero points of a DequantizeLinear cannot be left out; None if all are 0."""
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return None
    zero_point = node.inputs[2]
    if isinstance(zero_point, gs.Constant) and not values_of(zero_point).astype(np.int8).any():
        return None
    return f"the zero point {zero_point.name!r} is not 0"
