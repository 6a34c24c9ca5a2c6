"""Fold LayerNorm's scale and shift into the linear layers that read it.

With n = (x - mean) / std, LayerNorm gives n * gamma + beta, and for each linear layer on it

    (n * gamma + beta) W + b = n (diag(gamma) W) + (b + beta W),

which holds exactly, whatever gamma and beta are, as long as every reader is a MatMul by a
constant. The node stays, with a scale of ones (ONNX demands one) and without a shift. A layer
without a bias gets one. (The same step opens SliceGPT, arXiv 2401.15024, section 3.2, and
QuaRot, arXiv 2404.00456, section 4.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive, values_of
from ..editing import consumers, fresh_name, live_nodes
from ..matching import constant_problem, is_op
from .linear_layers import bias_add, bias_of, readers_problem, rewrite_constant


class FoldLayerNormAffine(Pass):
    """``LayerNormalization(x, gamma, beta)`` to one with a scale of ones and no shift."""

    name = "fold-layernorm-affine"
    summary = "LayerNorm's scale and shift go into the linear layers that read it"
    opsets = range(17, 25)

    def run(self, graph: gs.Graph) -> PassResult:
        tally, ones = Tally(), _Ones(graph)
        for norm in live_nodes(graph):
            if not is_op(norm, "LayerNormalization") or _is_plain(norm):
                continue
            problem = _problem(graph, norm)
            if problem is None:
                _fold(graph, norm, ones)
                tally.rewrote()
            else:
                tally.refuse(norm, problem)
        return tally.result()


class _Ones:
    """One constant of ones for each width and dtype, found in the graph or made."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[int, Any], gs.Constant] = {}

    def __call__(self, scale: gs.Constant) -> gs.Constant:
        key = scale.shape[0], np.dtype(scale.dtype)
        if key not in self._made:
            name = fresh_name(self._graph, f"ones_{key[0]}")
            self._made[key] = gs.Constant(name, np.ones(key[0], key[1]))
        return self._made[key]


def _shift(norm: gs.Node) -> gs.Tensor | None:
    given = len(norm.inputs) > 2 and not norm.inputs[2].is_empty()
    return norm.inputs[2] if given else None


def _is_plain(norm: gs.Node) -> bool:
    """Whether there is nothing left to fold."""
    scale, shift = norm.inputs[1], _shift(norm)
    if not isinstance(scale, gs.Constant) or not bool((values_of(scale) == 1).all()):
        return False
    return shift is None or _is_zero(shift)


def _is_zero(shift: gs.Tensor) -> bool:
    return isinstance(shift, gs.Constant) and not values_of(shift).any()


def _problem(graph: gs.Graph, norm: gs.Node) -> str | None:
    affine = [tensor for tensor in (norm.inputs[1], _shift(norm)) if tensor is not None]
    for tensor in affine:
        # These are only read, so that it does not matter who else reads them.
        problem = constant_problem(graph, tensor, *consumers(tensor))
        if problem is not None:
            return problem
    problem = readers_problem(graph, norm.outputs[0])
    if problem is not None:
        return problem
    width = consumers(norm.outputs[0])[0].inputs[1].shape[0]
    for tensor in affine:
        if list(tensor.shape) != [width]:
            return f"{tensor.name!r} has shape {list(tensor.shape)}, not one a channel"
    return None


def _fold(graph: gs.Graph, norm: gs.Node, ones: _Ones) -> None:
    scale, shift = norm.inputs[1], _shift(norm)
    for matmul in consumers(norm.outputs[0]):
        if shift is not None and not _is_zero(shift):
            _fold_shift(graph, matmul, shift)
        rewrite_constant(
            graph, matmul, matmul.inputs[1], "with_gamma", _scale_rows, others=[scale]
        )
    norm.inputs[1] = ones(scale)
    while len(norm.inputs) > 2:
        norm.inputs.pop()


def _scale_rows(weight: Array, scale: Array) -> Array:
    scaled: Array = weight * scale[:, None]
    return scaled


def _fold_shift(graph: gs.Graph, matmul: gs.Node, shift: gs.Constant) -> None:
    """Add ``shift @ weight`` behind a MatMul; its weight must still be the old one."""
    weight, result = matmul.inputs[1], matmul.outputs[0]
    add = bias_add(graph, matmul)
    if add is not None:
        rewrite_constant(
            graph, add, bias_of(add, result), "with_beta", _add_shift, [shift, weight]
        )
        return
    name = fresh_name(graph, f"{weight.name}.beta")
    bias = derive(name, [weight, shift], _shifted, (weight.shape[1],))
    inner = gs.Variable(fresh_name(graph, f"{result.name}.no_bias"), result.dtype)
    # The old tensor stays the layer's result, so that its readers and its name do too.
    matmul.outputs[0] = inner
    graph.nodes.append(gs.Node("Add", f"{inner.name}.add", {}, [inner, bias], [result]))


def _shifted(weight: Array, shift: Array) -> Array:
    moved: Array = shift.astype(np.float64) @ weight.astype(np.float64)
    return moved


def _add_shift(bias: Array, shift: Array, weight: Array) -> Array:
    return bias + _shifted(weight, shift)
