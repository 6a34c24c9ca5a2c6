"""Fold PEG's skip into its depthwise convolution.

For a depthwise convolution DW with an odd kernel, stride 1 and "same" padding,

    DW(x) + x = DW'(x),   w'[c, 0, m, m] = w[c, 0, m, m] + 1  at the centre m,

since the centre tap multiplies the pixel itself and the padding never reaches it. One pass
over the feature map is saved; multiply-accumulates stay the same. (LDPv2: arXiv 2402.03766,
equation 3.)
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive
from ..editing import fresh_name, replace_tensor, unlink
from ..matching import Match, any_, constant_problem, find_matches, op
from .windows import same_depthwise_problem

_PATTERN = op("Add", op("Conv", any_("x"), any_("weight"), bind="conv"), any_("x"))


class FoldPegSkip(Pass):
    """``Conv(x) + x`` to one depthwise convolution."""

    name = "fold-peg-skip"
    summary = "PEG's skip connection goes into the centre tap of its depthwise kernel"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            add = match.nodes[0]
            problem = _problem(graph, match)
            if problem is None:
                _fold(graph, match)
                tally.rewrote()
            else:
                tally.refuse(add, problem)
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    conv = match["conv"]
    return (
        constant_problem(graph, match["weight"], conv)
        or match.used_elsewhere(graph)
        or same_depthwise_problem(conv)
    )


def _fold(graph: gs.Graph, match: Match) -> None:
    conv, weight = match["conv"], match["weight"]
    centre = (slice(None), 0, *(size // 2 for size in weight.shape[2:]))

    def add_identity(kernel: Array) -> Array:
        folded: Array = kernel.copy()
        folded[centre] += 1
        return folded

    name = fresh_name(graph, f"{weight.name}.with_skip")
    conv.inputs[1] = derive(name, [weight], add_identity, weight.shape)
    conv.outputs[0].shape = match.root.shape  # Inference loses the names of axes.
    replace_tensor(graph, match.root, conv.outputs[0])
    unlink(match.nodes[0])
