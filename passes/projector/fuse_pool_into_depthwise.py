"""Fuse an average pool into the depthwise convolution behind it.

With k x k windows of stride k, and a depthwise convolution of an odd kernel m x m, stride 1
and "same" padding,

    DW(pool(x)) = DW'(x),   w'[c, 0, i, j] = w[c, 0, i // k, j // k] / (k * k),

a kernel of k * m x k * m, stride k, and k times the padding. The border is exact: a zero in
the padding of the pooled map is the mean of k * k zeros in the padding of the map itself. The
map must be a multiple of k: rows that the pool drops stand where the padding belongs.
PEG's skip, DW(pool(x)) + pool(x), adds 1 / (k * k) to the k x k taps in the centre.

The fused kernel multiplies k * k times as often as the depthwise convolution alone, and saves
writing and reading the pooled map.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive
from ..editing import consumers, fresh_name, is_graph_output, replace_tensor, unlink
from ..matching import Match, any_, constant_problem, describe, find_matches, is_op, op
from .windows import same_depthwise_problem, tiling_pool_problem

_PATTERN = op("Conv", op("AveragePool", any_("x"), bind="pool"), any_("weight"), bind="conv")


class FusePoolIntoDepthwise(Pass):
    """``Conv(AveragePool(x))``, perhaps ``+ AveragePool(x)``, to one convolution."""

    name = "fuse-pool-into-depthwise"
    summary = "average pool, depthwise convolution and skip become one strided convolution"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            skip = _skip(match)
            problem = _problem(graph, match, skip)
            if problem is None:
                _fuse(graph, match, skip)
                tally.rewrote()
            else:
                tally.refuse(match["conv"], problem)
        return tally.result()


def _skip(match: Match) -> gs.Node | None:
    """PEG's Add of the pooled map to its convolution, unless that is folded already."""
    pooled = match["conv"].inputs[0]
    for node in consumers(match.root):
        others = [tensor for tensor in node.inputs if tensor is not match.root]
        if is_op(node, "Add") and len(others) == 1 and others[0] is pooled:
            return node
    return None


def _problem(graph: gs.Graph, match: Match, skip: gs.Node | None) -> str | None:
    conv, weight = match["conv"], match["weight"]
    return (
        constant_problem(graph, weight, conv)
        or same_depthwise_problem(conv)
        or tiling_pool_problem(match["pool"])
        or _size_problem(match)
        or _readers_problem(graph, match, skip)
    )


def _size_problem(match: Match) -> str | None:
    x, kernel = match["x"], match["pool"].attrs["kernel_shape"]
    if x.shape is None or not all(isinstance(axis, int) for axis in x.shape[2:]):
        return f"the size of the map {x.name!r} is not known"
    sizes = list(x.shape[2:])
    if any(size % step for size, step in zip(sizes, kernel, strict=True)):
        return f"the map of {sizes} is no multiple of the pool's windows {list(kernel)}"
    return None


def _readers_problem(graph: gs.Graph, match: Match, skip: gs.Node | None) -> str | None:
    """Who else reads what vanishes."""
    inside = [match["conv"], skip]
    for tensor in match["conv"].inputs[0], match.root if skip is not None else None:
        if tensor is None:
            continue
        if is_graph_output(graph, tensor):
            return f"{tensor.name!r} inside it is also an output of the graph"
        for reader in consumers(tensor):
            if not any(reader is node for node in inside):
                return f"{tensor.name!r} inside it is also read by {describe(reader)}"
    return None


def _fuse(graph: gs.Graph, match: Match, skip: gs.Node | None) -> None:
    conv, weight = match["conv"], match["weight"]
    steps = [int(step) for step in match["pool"].attrs["kernel_shape"]]
    centre = (slice(None), 0, *(size // 2 for size in weight.shape[2:]))

    def spread(kernel: Array) -> Array:
        wide: Array = kernel.copy()
        if skip is not None:
            wide[centre] += 1
        for axis, step in enumerate(steps, 2):
            wide = np.repeat(wide, step, axis)
        return wide / math.prod(steps)

    sizes = [size * step for size, step in zip(weight.shape[2:], steps, strict=True)]
    name = fresh_name(graph, f"{weight.name}.with_pool")
    conv.inputs[0] = match["x"]
    conv.inputs[1] = derive(name, [weight], spread, [*weight.shape[:2], *sizes])
    pads = [size // 2 * step for size, step in zip(weight.shape[2:], steps, strict=True)]
    conv.attrs.update(kernel_shape=sizes, strides=steps, pads=pads * 2)
    if skip is not None:
        replace_tensor(graph, skip.outputs[0], conv.outputs[0])
        unlink(skip)
    unlink(match["pool"])
