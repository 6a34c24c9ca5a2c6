"""Which nodes of a float32 graph stay in float32 when the rest becomes float16.

Float16 reaches 65504 and keeps 11 bits. Squares, sums, exponentials and roots leave that range
or lose in it, so these operators stay in float32, and with them

- what only prepares their input: the square before a mean, the additive mask (with its -1e30,
  which is no float16 number) and the scale before a softmax;
- what is computed with a statistic (a mean, a root, a reciprocal): ``mean + eps``, and
  ``x * rsqrt`` with the whole row in float32, whose result is then rounded once;
- what leads to nothing but a sine or cosine: an angle of thousands must be met to a hundredth;
- what stands between integers, from a Cast of wider ones than 8 bits to a Cast to such: index
  arithmetic, which float16 leaves off by one from 2048 on;
- what stands between float32 nodes on all sides.

Such islands cost nothing: TensorRT takes Cast, softmax, Cast into its attention kernel, and
Cast, RMSNorm, Cast into one kernel. LayerNormalization is one node and computes inside in
float32 (``stash_type`` 1), so it is not an island.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..base import numpy_dtype
from ..editing import consumers, is_graph_output, producer
from ..general.op_kinds import LAYOUT_OPS, moved_inputs
from ..matching import is_foreign

_STATISTICS = frozenset(
    {
        *("CumSum", "Exp", "Log", "Pow", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum"),
        *("ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
        "Sqrt",
    }
)
_ISLANDS = _STATISTICS | {
    *("Cos", "GroupNormalization", "InstanceNormalization", "LogSoftmax", "LpNormalization"),
    *("MeanVarianceNormalization", "Sin", "Softmax", "Tan"),
}
_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Ceil", "Clip", "Div", "Floor", "Max", "Min", "Mod", "Mul", "Neg"),
        *("Round", "Sign", "Sub", "Sum", "Where"),
    }
)
_ANGULAR = frozenset({"Cos", "Sin", "Tan"})
_PRODUCTS = frozenset({"Einsum", "MatMul"})
# Their dtype is not that of their inputs, or they only ask a question of them.
_TYPED_BY_THEMSELVES = frozenset(
    {
        *("Cast", "CastLike", "ConstantOfShape", "Equal", "EyeLike", "Greater", "IsInf"),
        *("GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "RandomNormal", "RandomUniform"),
        *("Range", "Shape", "Size"),
    }
)
BLIND_OPS = frozenset({"Cast", "Shape", "Size"})
"""They take any dtype and need no cast before them."""


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to be float32."""
    known = not tensor.is_empty() and tensor.dtype is not None
    return known and bool(np.dtype(numpy_dtype(tensor)) == np.float32)


def find_float32_nodes(graph: gs.Graph) -> set[int]:
    """Ids of the nodes that stay in float32; the graph must be sorted."""
    kept = {id(n) for n in graph.nodes if n.op in _TYPED_BY_THEMSELVES and not is_foreign(n)}
    kept |= _prepared(graph) | _with_statistics(graph) | _angles(graph) | _indices(graph)
    return kept | _between(graph, kept)


def _is_flexible(node: gs.Node) -> bool:
    """Whether it computes as well in float32, and nothing is gained by float16."""
    return not is_foreign(node) and (node.op in _ELEMENTWISE or node.op in LAYOUT_OPS)


def _operands(node: gs.Node) -> list[gs.Tensor]:
    """The float32 tensors that a flexible node computes with or moves."""
    if node.op in LAYOUT_OPS:
        return [node.inputs[index] for index in moved_inputs(node)]
    return [tensor for tensor in node.inputs if is_float32(tensor)]


def _prepared(graph: gs.Graph) -> set[int]:
    """Islands, and the nodes before them whose results only they read."""
    found: set[int] = set()
    for node in reversed(graph.nodes):
        if not any(is_float32(tensor) for tensor in (*node.inputs, *node.outputs)):
            continue
        island = node.op in _ISLANDS and not is_foreign(node)
        # A table that is gathered from is a weight, which float16 halves.
        flexible = _is_flexible(node) and node.op != "Gather"
        if island or (flexible and _only_read_by(graph, node, found)):
            found.add(id(node))
    return found


def _only_read_by(graph: gs.Graph, node: gs.Node, found: set[int]) -> bool:
    readers = [reader for tensor in node.outputs for reader in consumers(tensor)]
    readers = [reader for reader in readers if reader.op not in ("Shape", "Size")]
    if any(is_graph_output(graph, tensor) for tensor in node.outputs):
        return False
    return bool(readers) and all(id(reader) in found for reader in readers)


def _angles(graph: gs.Graph) -> set[int]:
    """Nodes whose results only a sine or cosine reads, products and tables among them."""
    found: set[int] = set()
    for node in reversed(graph.nodes):
        angular = node.op in _ANGULAR and not is_foreign(node)
        product = node.op in _PRODUCTS and not is_foreign(node)
        if angular or ((product or _is_flexible(node)) and _only_read_by(graph, node, found)):
            found.add(id(node))
    return found


def _indices(graph: gs.Graph) -> set[int]:
    """Nodes on a float32 path from a Cast of integers to a Cast to integers."""
    after: set[int] = set()
    for node in graph.nodes:
        read = any(id(tensor) in after for tensor in node.inputs)
        if read or (node.op == "Cast" and _is_wide_integer(node.inputs[0])):
            after |= {id(tensor) for tensor in node.outputs if is_float32(tensor)}
    before: set[int] = set()
    found: set[int] = set()
    for node in reversed(graph.nodes):
        leads = any(id(tensor) in before for tensor in node.outputs)
        if leads or (node.op == "Cast" and _is_wide_integer(node.outputs[0])):
            found.add(id(node))
            before |= {id(tensor) for tensor in node.inputs if id(tensor) in after}
    return found


def _is_wide_integer(tensor: gs.Tensor) -> bool:
    if tensor.dtype is None:
        return False
    dtype = np.dtype(numpy_dtype(tensor))
    return dtype.kind in "iu" and dtype.itemsize > 1


def _with_statistics(graph: gs.Graph) -> set[int]:
    """Nodes that compute with a mean, a root and the like."""
    found: set[int] = set()
    statistics: set[int] = set()
    for node in graph.nodes:
        if node.op in _STATISTICS and not is_foreign(node):
            statistics |= {id(tensor) for tensor in node.outputs if is_float32(tensor)}
            continue
        if not _is_flexible(node):
            continue
        operands = _operands(node)
        if not any(id(tensor) in statistics for tensor in operands):
            continue
        whole = all(id(t) in statistics or isinstance(t, gs.Constant) for t in operands)
        if whole:
            statistics |= {id(tensor) for tensor in node.outputs}
        if whole or node.op in _ELEMENTWISE:
            found.add(id(node))
    return found


def _between(graph: gs.Graph, kept: set[int]) -> set[int]:
    """Flexible nodes whose every operand comes from float32 nodes and goes to such."""
    found: set[int] = set()
    for node in graph.nodes:
        if id(node) not in kept and _is_flexible(node) and _all_made_by(node, kept | found):
            found.add(id(node))
    while True:
        stays = {
            id(n) for n in graph.nodes if id(n) in found and _is_between(graph, n, kept, found)
        }
        if stays == found:
            return found
        found = stays


def _is_between(graph: gs.Graph, node: gs.Node, kept: set[int], found: set[int]) -> bool:
    inside = kept | found
    return _all_made_by(node, inside) and _only_read_by(graph, node, inside)


def _all_made_by(node: gs.Node, inside: set[int]) -> bool:
    made = [producer(t) for t in _operands(node) if not isinstance(t, gs.Constant)]
    return bool(made) and all(maker is not None and id(maker) in inside for maker in made)
