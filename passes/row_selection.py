"""Push a selection of rows up through operators that treat every row alone.

For an operator f that works on each row by itself, f(x)[rows] = f(x[rows]): to select first
means to compute fewer rows. Rows lie along one axis, counted from the end (-2 of [B, N, C] and
of [S, V]). A node is *row-wise* if each row of its output depends on the same row of its
inputs alone: MatMul by a weight, elementwise operators, whatever works along the last axis.

From a tensor whose rows are selected, every node above it that is row-wise and read by nobody
outside is taken into a region that computes the selected rows only; where the region ends, the
rows are selected, once for each tensor that comes in. The numbers stay, to the rounding of
products that are now summed for fewer rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from .deferred import values_of
from .editing import consumers, insert_node, is_graph_output, producer
from .matching import describe, is_foreign


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _words(
    """
    Abs Add Cast Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Log Max Min
    Mish Mul Neg Pow Reciprocal Relu Sigmoid Softplus Sqrt Sub Sum Swish Tanh Where
    """
)
_DEFAULT_AXIS = {
    "Concat": -1,
    "LayerNormalization": -1,
    "LogSoftmax": -1,
    "RMSNormalization": -1,
    "Softmax": -1,
    "Split": 0,
}
_REDUCTIONS = _words("ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare")
_WEIGHT_MAKERS = _words("Cast DequantizeLinear Reshape Transpose")
_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class RowSelection:
    """The rows from ``start`` to the last.

    Attributes:
        start: first row; negative counts from the last.
        count: how many rows that are.
        stem: goes into the names of selected tensors.
        axis: that the rows lie along, counted from the end, -2 or less.
    """

    start: int
    count: int | str
    stem: str
    axis: int = -2


@dataclass
class _Region:
    """Nodes that compute the selected rows only, and which of their inputs have rows."""

    nodes: dict[int, gs.Node] = field(default_factory=dict)
    inputs: dict[int, list[int]] = field(default_factory=dict)

    def tensors(self, node: gs.Node) -> list[gs.Tensor]:
        return [node.inputs[index] for index in self.inputs[id(node)]]


def select_rows_early(
    graph: gs.Graph, root: gs.Variable, selection: RowSelection, reader: gs.Node | None = None
) -> str | None:
    """Compute the selected rows of ``root`` alone, as early as row-wise nodes allow.

    Args:
        root: has the selected rows afterwards.
        reader: the one node that may read it.

    Returns:
        Why it was left alone, a sentence; None if it was done.
    """
    made = producer(root)
    for tensor in made.outputs if made is not None else [root]:
        for node in consumers(tensor):
            if node is not reader:
                return f"{tensor.name!r} is also read by {describe(node)}"
        if tensor is not root and is_graph_output(graph, tensor):
            return f"{tensor.name!r} is also an output of the graph"
    if made is None:
        return f"{root.name!r} is made by no node"
    region = _Region()
    problem = _admit(region, made, root, selection.axis)
    if problem is None:
        _grow(graph, region, selection.axis)
        _select_at_border(graph, region, selection)
    return problem


def _admit(region: _Region, node: gs.Node, made: gs.Tensor, axis: int) -> str | None:
    """Take a node into the region; why not, if it cannot be."""
    rows = _rows(made, axis)
    if rows is None:
        return f"the rows of {made.name!r} are not known"
    inputs = _inputs_with_rows(node, axis, rows)
    if isinstance(inputs, str):
        return inputs
    region.nodes[id(node)] = node
    region.inputs[id(node)] = inputs
    return None


def _grow(graph: gs.Graph, region: _Region, axis: int) -> None:
    """Admit what is above, as long as it is row-wise and only read inside."""
    pending = list(region.nodes.values())
    while pending:
        for tensor in region.tensors(pending.pop()):
            above = producer(tensor)
            if above is None or id(above) in region.nodes:
                continue
            if _read_outside(graph, region, above) or _admit(region, above, tensor, axis):
                continue
            pending.append(above)


def _read_outside(graph: gs.Graph, region: _Region, node: gs.Node) -> bool:
    return any(
        is_graph_output(graph, tensor)
        or any(id(reader) not in region.nodes for reader in consumers(tensor))
        for tensor in node.outputs
    )


def _select_at_border(graph: gs.Graph, region: _Region, selection: RowSelection) -> None:
    inside = {id(tensor) for node in region.nodes.values() for tensor in node.outputs}
    selected: dict[int, gs.Variable] = {}
    for node in region.nodes.values():
        for index in region.inputs[id(node)]:
            tensor = node.inputs[index]
            if id(tensor) in inside:
                continue
            if id(tensor) not in selected:
                selected[id(tensor)] = _select(graph, tensor, selection)
            node.inputs[index] = selected[id(tensor)]
    for node in region.nodes.values():
        for tensor in node.outputs:
            tensor.shape = _selected_shape(tensor, selection)


def _select(graph: gs.Graph, tensor: gs.Tensor, selection: RowSelection) -> gs.Variable:
    bounds = (selection.start, _TO_THE_END, len(tensor.shape) + selection.axis, 1)
    return insert_node(
        graph,
        "Slice",
        [tensor, *(np.array([value], np.int64) for value in bounds)],
        tensor,
        shape=_selected_shape(tensor, selection),
        stem=f"{tensor.name}_{selection.stem}",
    )


def _selected_shape(tensor: gs.Tensor, selection: RowSelection) -> list[int | str] | None:
    if tensor.shape is None:
        return None
    shape = list(tensor.shape)
    shape[selection.axis] = selection.count
    return shape


def _rows(tensor: gs.Tensor, axis: int) -> int | str | None:
    """How many rows a tensor has; 1 if it has no such axis, None if that is not known."""
    if tensor.shape is None:
        return None
    rows: int | str | None = tensor.shape[axis] if len(tensor.shape) >= -axis else 1
    return rows


def _inputs_with_rows(node: gs.Node, axis: int, rows: int | str) -> list[int] | str:
    """Which inputs have the output's rows; a sentence if the node is not row-wise."""
    if is_foreign(node):
        return f"{describe(node)} is of the domain {node.domain!r}, not known to be row-wise"
    if node.op == "MatMul":
        weight = node.inputs[1]
        if _is_weight(weight) and len(weight.shape or []) == 2:
            return [0]
        return f"{describe(node)} multiplies by {weight.name!r}, which is no constant matrix"
    if node.op not in _ELEMENTWISE:
        problem = _along_other_axes(node)
        if problem is not None:
            return problem
    return _broadcast(node, axis, rows)


def _broadcast(node: gs.Node, axis: int, rows: int | str) -> list[int] | str:
    found = []
    for index, tensor in enumerate(node.inputs):
        if tensor.is_empty() or _rows(tensor, axis) == 1:
            continue
        if isinstance(tensor, gs.Constant):
            return f"{describe(node)} has the constant {tensor.name!r}, of several rows"
        if _rows(tensor, axis) != rows:
            return f"{describe(node)} reads {tensor.name!r}, which has not its {rows!r} rows"
        found.append(index)
    return found


def _along_other_axes(node: gs.Node) -> str | None:
    """Why a node is not known to work along the last axis only."""
    shape = node.inputs[0].shape if node.inputs else None
    if node.op in _REDUCTIONS and node.attrs.get("keepdims", 1) == 1:
        axes = _reduced_axes(node)
    elif node.op in _DEFAULT_AXIS:
        axes = [node.attrs.get("axis", _DEFAULT_AXIS[node.op])]
    else:
        return f"{describe(node)} is not known to be row-wise"
    if not shape or not axes or any(axis % len(shape) != len(shape) - 1 for axis in axes):
        return f"{describe(node)} works along the axes {axes}, not the last alone"
    return None


def _reduced_axes(node: gs.Node) -> list[int]:
    if len(node.inputs) < 2:
        return list(node.attrs.get("axes", []))
    axes = node.inputs[1]
    return values_of(axes).tolist() if isinstance(axes, gs.Constant) else []


def _is_weight(tensor: gs.Tensor) -> bool:
    """A constant, or one that is dequantized, cast or laid out anew on the way."""
    if isinstance(tensor, gs.Constant):
        return True
    made = producer(tensor)
    if made is None or made.op not in _WEIGHT_MAKERS or is_foreign(made):
        return False
    return all(_is_weight(value) for value in made.inputs)
