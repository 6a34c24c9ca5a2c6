"""The cache written in place by ``TensorScatter``, and read by ``Attention`` (opset 24).

    present = TensorScatter(past, new rows, past_length)       [1, H_kv, C, D], axis -2
    output  = Attention(query, present_key, present_value, mask)
    mask[0, 0, i, j] = j <= past_length + i                    bool [1, 1, S, C]

``Attention`` repeats fewer key and value heads itself, and hides a key where the mask is
False; rows behind the new ones have j > past_length + i and are hidden too. ``is_causal``
would not do: TensorRT aligns it to the first key. ``scale`` is 1 and the query stays scaled by
whoever scales it: TensorRT's parser multiplies the whole cache with the root of any other.

TensorRT 10.15 and newer read both operators (onnx-tensorrt's changelog); the cache must be an
input and an output of the network, the axis -2, its length static. What is saved is the copy
of the whole past that Concat makes in each layer; what is paid is that attention reads all C
rows. TensorRT has an attention kernel for more than one query in FP16 alone, so this belongs
behind a conversion to FP16 there.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from ..editing import fresh_name, insert_node, replace_tensor, set_opset
from ..matching import describe, is_foreign
from .decoder_attention import AttentionBlock
from .fixed_cache import FixedCachePass, make_present

OPSET = 24

# Operators that mean something else in opset 24 than in 18 (ONNX's Changelog.md).
_CHANGED = frozenset({"AveragePool", "GridSample", "GroupNormalization", "LpPool", "Resize"})


class UseTensorScatter(FixedCachePass):
    """Append form to the fixed form of TensorRT 10.16, in opset 24.

    The IR version stays as it is: JetPack 7's parser reads IR 11, older than opset 24's own.

    Args:
        capacity: C, rows of each cache tensor.
    """

    name = "use-tensor-scatter"
    summary = "new keys and values are scattered into a cache of fixed size"
    opsets = range(18, 25)

    def requires(self, graph: gs.Graph) -> None:
        super().requires(graph)
        for node in graph.nodes:
            if node.op in _CHANGED and not is_foreign(node):
                raise PassError(
                    f"{describe(node)} means something else in opset {OPSET}, which "
                    f"{self.name} raises the graph to. Leave this pass out."
                )

    def rewrite(
        self, graph: gs.Graph, blocks: list[AttentionBlock], length: gs.Variable
    ) -> None:
        masks: dict[int, gs.Variable] = {}
        for block in blocks:
            key = id(block.positions)
            if key not in masks:
                masks[key] = self._mask(graph, block.positions)
            self._replace(graph, block, length, masks[key])
        set_opset(graph, OPSET)

    def _mask(self, graph: gs.Graph, positions: gs.Variable) -> gs.Variable:
        # Four axes from the start: widened behind the comparison, TensorRT-RTX 1.7 fails to
        # build it for a range of S that is as small as 1..16.
        axes = np.array([0, 1, 3])
        column = insert_node(graph, "Unsqueeze", [positions, axes], stem="positions_column")
        keys = np.arange(self.capacity, dtype=np.int64).reshape(1, 1, 1, -1)
        return insert_node(graph, "LessOrEqual", [keys, column], stem="visible_rows")

    def _replace(
        self, graph: gs.Graph, block: AttentionBlock, length: gs.Variable, mask: gs.Variable
    ) -> None:
        operands = [_heads_first(graph, block.match["query"])]
        for past, rows in zip(block.pasts, block.rows, strict=True):
            present = make_present(graph, rows, self.capacity)
            scattered = [past, _heads_first(graph, rows), length]
            name = fresh_name(graph, f"{present.name}.scatter")
            attrs = {"axis": -2, "mode": "linear"}
            graph.nodes.append(gs.Node("TensorScatter", name, attrs, scattered, [present]))
            operands.append(present)
        attended = insert_node(graph, "Attention", [*operands, mask], attrs={"scale": 1.0})
        rows_first = insert_node(graph, "Transpose", [attended], attrs={"perm": [0, 2, 1, 3]})
        output = insert_node(graph, "Squeeze", [rows_first, np.array([0])], block.match.root)
        replace_tensor(graph, block.match.root, output)


def _heads_first(graph: gs.Graph, rows: gs.Variable) -> gs.Variable:
    """[S, H, D] to [1, H, S, D]."""
    batch = insert_node(graph, "Unsqueeze", [rows, np.array([0])])
    return insert_node(graph, "Transpose", [batch], attrs={"perm": [0, 2, 1, 3]})
