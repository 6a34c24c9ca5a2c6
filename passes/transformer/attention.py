"""Attention written out: where its scores and softmax are, and which layers feed it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from ..editing import consumers, live_nodes, producer
from ..matching import is_op
from .linear_layers import is_float_cast, is_matmul

_MOVES = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Split")
_COMBINES = ("Add", "Sub", "Mul", "Div", "Concat")
_FORWARDS = (*_MOVES, "Cast", "Neg")


@dataclass(frozen=True)
class Attention:
    """``softmax(query @ key + mask) @ value``.

    Attributes:
        scores: the MatMul of queries and keys.
        softmax: of the scores, masked or not.
        mix: the MatMul of probabilities and values.
    """

    scores: gs.Node
    softmax: gs.Node
    mix: gs.Node

    @property
    def query(self) -> gs.Tensor:
        """Left operand of the scores."""
        return self.scores.inputs[0]

    @property
    def key(self) -> gs.Tensor:
        """Right operand of the scores, transposed."""
        return self.scores.inputs[1]

    @property
    def value(self) -> gs.Tensor:
        """Right operand of the mix."""
        return self.mix.inputs[1]


def is_move(node: gs.Node) -> bool:
    """Whether a node only moves its first input's elements about, or rounds them."""
    return is_op(node, *_MOVES) or is_float_cast(node)


def find_attentions(graph: gs.Graph) -> Iterator[Attention]:
    """Every softmax between two MatMuls."""
    for softmax in live_nodes(graph):
        if not is_op(softmax, "Softmax"):
            continue
        scores = layers_above(softmax.inputs[0])
        mixes = _mixes(softmax.outputs[0])
        if len(scores) == 1 and len(mixes) == 1:
            yield Attention(scores[0], softmax, mixes[0])


def _mixes(probabilities: gs.Tensor) -> list[gs.Node]:
    found: list[gs.Node] = []
    for node in consumers(probabilities):
        if is_op(node, "Cast"):
            found += _mixes(node.outputs[0])
        elif is_matmul(node) and node.inputs[0] is probabilities:
            found.append(node)
    return found


def layers_above(tensor: gs.Tensor) -> list[gs.Node]:
    """The nearest MatMuls that a tensor comes from, each once.

    Looked for through what stands between a projection and the product it goes into: biases,
    head axes, rotary embedding, scales, past keys and values, casts.
    """
    found: dict[int, gs.Node] = {}
    seen: set[int] = set()
    pending = [tensor]
    while pending:
        node = producer(pending.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if is_matmul(node):
            found[id(node)] = node
        elif is_op(node, *_COMBINES):
            pending += node.inputs
        elif is_op(node, *_FORWARDS):
            pending.append(node.inputs[0])
    return list(found.values())
