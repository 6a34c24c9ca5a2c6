"""What kind of work an operator does, where a rewrite turns on it."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..matching import is_foreign

LAYOUT_OPS = frozenset(
    {
        *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Reshape"),
        *("Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""They move or repeat values and compute none: the same in every dtype."""

_RANDOM_OPS = frozenset(
    {
        *("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"),
        *("RandomUniform", "RandomUniformLike"),
    }
)
_QUANTIZERS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})


def is_pure(node: gs.Node) -> bool:
    """Whether a node gives the same for the same inputs, and may be computed elsewhere.

    Not so for random numbers, for operators outside ONNX and those with subgraphs, and for
    quantizers, whose place in the graph is what they say.
    """
    if is_foreign(node) or node.op in _RANDOM_OPS or node.op in _QUANTIZERS:
        return False
    return not any(isinstance(value, gs.Graph) for value in node.attrs.values())


def moved_inputs(node: gs.Node) -> list[int]:
    """Indices of the inputs whose values a layout operator moves; the others steer it."""
    return list(range(len(node.inputs))) if node.op == "Concat" else [0]
