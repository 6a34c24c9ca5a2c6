"""Pool before the second pointwise convolution of LDPv2, not behind it.

The pointwise convolution acts on each token by itself, the average pool on each channel by
itself, and the weights of a window sum to 1. So for the k x k windows of the token grid

    pool(h W2 + b2) = pool(h) W2 + b2,

and W2 meets k * k times fewer tokens. This is exact where a window holds real tokens only: no
padding, and no window that ``ceil_mode`` lets hang over the edge. Rows that the grid has
beyond a multiple of k are dropped by the pool in either order. W2 and b2 are not changed, so
others may read them. (LDPv2: arXiv 2402.03766, equation 3.)

W2 stays a MatMul on tokens, which weight-only quantization works on; the pool stays an
AveragePool on the map, which every runtime knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import values_of
from ..editing import insert_node, replace_tensor, unlink
from ..matching import Match, any_, find_matches, match_tensor, one_of, op
from .windows import tiling_pool_problem

_LINEAR = op("MatMul", any_("x"), any_("weight"), bind="matmul")
_PATTERN = op(
    "AveragePool",
    op(
        "Reshape",
        op("Transpose", one_of(op("Add", _LINEAR, any_("bias")), _LINEAR), bind="transpose"),
        any_("sizes"),
        bind="reshape",
    ),
    bind="pool",
)
_TO_CHANNELS = [0, 2, 1]
"""[B, N, C] to [B, C, N], and back."""


class MovePoolBeforePointwise(Pass):
    """``pool(linear(x))`` to ``linear(pool(x))`` on a grid of tokens."""

    name = "move-pool-before-pointwise"
    summary = "the average pool comes before the second pointwise convolution: 4x fewer MACs"

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for found in find_matches(graph, _PATTERN):
            match: Match | None = found
            while match is not None:  # Two linears in a row are passed one by one.
                problem = _problem(graph, match)
                if problem is not None:
                    tally.refuse(match["pool"], problem)
                    break
                match = match_tensor(_PATTERN, _move(graph, match))
                tally.rewrote()
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    """Why the two may not change places; None if they may."""
    return (
        match.used_elsewhere(graph)
        or tiling_pool_problem(match["pool"])
        or _linear_problem(match)
        or _layout_problem(match)
    )


def _linear_problem(match: Match) -> str | None:
    x, weight = match["x"], match["weight"]
    if x.shape is None or len(x.shape) != 3 or not isinstance(x.shape[2], int):
        return f"{x.name!r} is not [batch, tokens, channels] but {x.shape}"
    if weight.shape is None or len(weight.shape) != 2:
        return f"the weight {weight.name!r} is no matrix but {weight.shape}"
    if "bias" in match:
        bias = match["bias"]
        if bias.shape is None or any(axis != 1 for axis in bias.shape[:-1]):
            return f"the bias {bias.name!r} of {bias.shape} is not the same for every token"
        if bias.shape and bias.shape[-1] not in (1, weight.shape[1]):
            return f"the bias {bias.name!r} widens {weight.shape[1]} channels to {bias.shape}"
    return None


def _layout_problem(match: Match) -> str | None:
    transpose, reshape = match["transpose"], match["reshape"]
    if transpose.attrs.get("perm") != _TO_CHANNELS:
        return f"the tokens are transposed by {transpose.attrs.get('perm')}"
    if not isinstance(match["sizes"], gs.Constant):
        return f"the grid's sizes {match['sizes'].name!r} are computed"
    rows, grid = reshape.inputs[0].shape, reshape.outputs[0].shape
    known = rows is not None and grid is not None and len(grid) == 4
    if not known or not all(isinstance(axis, int) for axis in (*rows[1:], *grid[1:])):
        return f"the grid {grid} is not known"
    if grid[1] != rows[1] or math.prod(grid[2:]) != rows[2]:
        return f"the tokens {rows} do not become a grid, but {grid}"
    return None


def _move(graph: gs.Graph, match: Match) -> gs.Variable:
    """Build the new order; give the pooled map that stands before the linear."""
    x, reshape, pooled = match["x"], match["reshape"], match.root
    channels, before, after = x.shape[2], reshape.outputs[0].shape[2:], pooled.shape[2:]
    count = math.prod(after)
    grid = _reshaped(graph, match, _transposed(graph, x), [channels, *before])
    windows = insert_node(
        graph,
        "AveragePool",
        [grid],
        shape=[x.shape[0], channels, *after],
        dtype=x.dtype,
        attrs=dict(match["pool"].attrs),
    )
    tokens = _transposed(graph, _reshaped(graph, match, windows, [channels, count]))
    rows = _transposed(graph, _linear(graph, match, tokens))
    replace_tensor(graph, pooled, _reshaped(graph, match, rows, pooled.shape[1:]))
    for node in match.nodes:
        unlink(node)
    return windows


def _reshaped(
    graph: gs.Graph, match: Match, value: gs.Tensor, sizes: Sequence[int]
) -> gs.Variable:
    """``value`` in another shape behind the batch, which is given as it was captured."""
    batch = int(values_of(match["sizes"])[0])
    return insert_node(
        graph,
        "Reshape",
        [value, np.array([batch, *sizes], np.int64)],
        shape=[value.shape[0], *sizes],
        dtype=value.dtype,
        attrs=dict(match["reshape"].attrs),
    )


def _transposed(graph: gs.Graph, value: gs.Tensor) -> gs.Variable:
    shape = [value.shape[axis] for axis in _TO_CHANNELS]
    return insert_node(
        graph,
        "Transpose",
        [value],
        shape=shape,
        dtype=value.dtype,
        attrs={"perm": list(_TO_CHANNELS)},
    )


def _linear(graph: gs.Graph, match: Match, tokens: gs.Tensor) -> gs.Variable:
    product = insert_node(
        graph,
        "MatMul",
        [tokens, match["weight"]],
        shape=[*tokens.shape[:2], match["weight"].shape[1]],
        dtype=tokens.dtype,
        stem=f"{match['matmul'].name}.pooled",
    )
    if "bias" not in match:
        return product
    return insert_node(graph, "Add", [product, match["bias"]], like=product)
