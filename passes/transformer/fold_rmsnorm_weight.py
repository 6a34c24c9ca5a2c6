"""Fold RMSNorm's weight into the linear layers that read it.

    (n * w) W = n (diag(w) W),    n = x / sqrt(mean(x^2) + eps),

exactly, as long as every reader is a MatMul by a constant: one pass over the hidden state is
saved in each norm. (arXiv 2401.15024, section 3.1.)

The algebra holds for any product with a vector of channels. This pass still asks for a norm in
front of it: its count is then one a norm, and scales that somebody put into a graph on purpose
(to smooth activations before quantization) are not undone. Over which axes the mean is taken
does not matter here.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array
from ..editing import consumers, is_graph_output, replace_tensor, unlink
from ..matching import (
    Match,
    any_,
    cast,
    constant_problem,
    describe,
    find_matches,
    one_of,
    op,
)
from .linear_layers import is_float_cast, readers_problem, rewrite_constant

_X = cast(any_("x"))
_SQUARE = one_of(op("Mul", _X, _X), op("Pow", _X, any_()))
_ROOT = op("Sqrt", op("Add", op("ReduceMean", _SQUARE), any_()))
_NORMED = one_of(op("Mul", _X, op("Reciprocal", _ROOT)), op("Div", _X, _ROOT))
_PATTERN = op("Mul", cast(_NORMED, "cast"), any_("weight"))


class FoldRmsNormWeight(Pass):
    """``(normed * weight) @ W`` to ``normed @ W'``."""

    name = "fold-rmsnorm-weight"
    summary = "RMSNorm's weight goes into the linear layers that read it"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            multiply = match.nodes[0]
            problem = _problem(graph, match)
            if problem is None:
                _fold(graph, match)
                tally.rewrote()
            else:
                tally.refuse(multiply, problem)
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    weight, result = match["weight"], match.root
    # The weight is only read, so that it does not matter who else reads it.
    problem = constant_problem(graph, weight, *consumers(weight))
    if problem is not None:
        return problem
    if is_graph_output(graph, result):
        return f"{result.name!r} is an output of the graph"
    if "cast" in match and not is_float_cast(match["cast"]):
        return f"{describe(match['cast'])} does not give floats"
    scaled = _read_by_layers(result)
    problem = readers_problem(graph, scaled)
    if problem is not None:
        return problem
    width = consumers(scaled)[0].inputs[1].shape[0]
    if list(weight.shape) != [width]:
        return f"the weight {weight.name!r} has shape {list(weight.shape)}, not one a channel"
    normed = _normed(match)
    if not normed.shape or normed.shape[-1] != width:
        return f"the weight {weight.name!r} widens {normed.name!r} of {normed.shape}"
    return None


def _normed(match: Match) -> gs.Tensor:
    """What the weight multiplies."""
    left, right = match.nodes[0].inputs
    return right if left is match["weight"] else left


def _read_by_layers(result: gs.Tensor) -> gs.Tensor:
    """What the linear layers read: the product, or its Cast out of a float32 island."""
    readers = consumers(result)
    if len(readers) == 1 and is_float_cast(readers[0]):
        return readers[0].outputs[0]
    return result


def _fold(graph: gs.Graph, match: Match) -> None:
    weight = match["weight"]
    for matmul in consumers(_read_by_layers(match.root)):
        rewrite_constant(
            graph, matmul, matmul.inputs[1], "with_norm", _scale_rows, others=[weight]
        )
    replace_tensor(graph, match.root, _normed(match))
    unlink(match.nodes[0])


def _scale_rows(matrix: Array, weight: Array) -> Array:
    scaled: Array = matrix * weight.reshape(-1, 1)
    return scaled
