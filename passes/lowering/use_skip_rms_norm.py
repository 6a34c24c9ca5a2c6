"""A residual sum and the RMS norm behind it in one operator of ONNX Runtime.

    h = a + b,   y = h / sqrt(mean(h^2) + eps) * w
    y, -, -, h = com.microsoft.SkipSimplifiedLayerNormalization(a, b, w)

The sum is the operator's fourth output, which the next residual reads. Where the weight has
been folded into the layers behind, w is 1. A norm whose input is no sum (the first one of a
decoder) is left alone. (ContribOperators.md of ONNX Runtime; RMSNorm: arXiv 1910.07467.)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.targets import ORT_DOMAIN

from ..base import Pass, PassResult, Tally
from ..deferred import values_of
from ..editing import consumers, fresh_name, is_graph_output, producer, replace_tensor
from ..matching import Match, any_, const, describe, find_matches, op

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))
_SQUARE = op("Mul", any_("x"), any_("x"))
_MEAN = op("ReduceMean", _SQUARE, const("axes"), bind="mean")
_ROOT = op("Reciprocal", op("Sqrt", op("Add", _MEAN, const("epsilon"))))
_PATTERN = op("Mul", any_("x"), _ROOT)


class UseSkipRmsNorm(Pass):
    """``RMSNorm(a + b)`` to ``SkipSimplifiedLayerNormalization``."""

    name = "use-skip-rms-norm"
    summary = "residual sums and RMS norms become ONNX Runtime's one operator"
    opsets = range(18, 25)

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            problem = _problem(graph, match)
            if problem is None:
                _replace(graph, match)
                tally.rewrote()
            else:
                tally.refuse(match.nodes[0], problem)
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    x, mean, epsilon = match["x"], match["mean"], match["epsilon"]
    add = producer(x)
    if add is None or add.op != "Add":
        return f"{x.name!r} is no sum"
    if x.dtype not in _FLOATS:
        return f"{x.name!r} is {x.dtype}"
    shapes = [list(tensor.shape or ()) for tensor in (*add.inputs, x)]
    if len(shapes[0]) not in (2, 3) or shapes[0] != shapes[1] or shapes[1] != shapes[2]:
        return f"{add.inputs[0].name!r} and {add.inputs[1].name!r} are not rows of one width"
    if None in shapes[0]:
        return f"an axis of {x.name!r} is not known, so {describe(add)} may broadcast"
    if not isinstance(shapes[0][-1], int):
        return f"the width of {x.name!r} is not known"
    axes = values_of(match["axes"]).tolist()
    if axes not in ([-1], [len(shapes[0]) - 1]) or not mean.attrs.get("keepdims", 1):
        return f"{mean.name!r} is not over the last axis"
    if values_of(epsilon).size != 1 or len(epsilon.shape) > len(shapes[0]):
        return f"{epsilon.name!r} is not one number"
    return match.used_elsewhere(graph)


def _replace(graph: gs.Graph, match: Match) -> None:
    x, add = match["x"], producer(match["x"])
    assert add is not None
    normed, weight = _weighted(graph, match.root)
    if weight is None:
        ones = np.ones(x.shape[-1], np.dtype(x.dtype))
        weight = gs.Constant(fresh_name(graph, f"{match.root.name}.ones"), ones)
    name = fresh_name(graph, f"{match.root.name}_skip_norm")
    output = gs.Variable(name, x.dtype, list(x.shape))
    total = gs.Variable(fresh_name(graph, f"{x.name}.sum", [name]), x.dtype, list(x.shape))
    unused = [gs.Variable.empty(), gs.Variable.empty()]
    node = gs.Node(
        "SkipSimplifiedLayerNormalization",
        name,
        {"epsilon": float(values_of(match["epsilon"]).item())},
        [*add.inputs, weight],
        [output, *unused, total],
        domain=ORT_DOMAIN,
    )
    graph.nodes.append(node)
    replace_tensor(graph, normed, output)
    replace_tensor(graph, x, total)


def _weighted(graph: gs.Graph, normed: gs.Tensor) -> tuple[gs.Tensor, gs.Constant | None]:
    """The norm behind its weight, and the weight; or the norm alone."""
    readers = consumers(normed)
    if len(readers) != 1 or readers[0].op != "Mul" or is_graph_output(graph, normed):
        return normed, None
    for tensor in readers[0].inputs:
        if isinstance(tensor, gs.Constant) and list(tensor.shape) == list(normed.shape[-1:]):
            return readers[0].outputs[0], tensor
    return normed, None
