"""Fold what is known into constants.

A pure node whose inputs are all constants gives the same each time: it is evaluated once, by
ONNX's reference evaluator. The axes of a tensor that are known give ``Shape(start, end)``,
``Gather(Shape(x), i)`` and ``Slice(Shape(x))`` of just those axes, whatever the others are.

Only small results are kept, and nothing large is read for them: a weight that is transposed
in the graph stays one weight and a Transpose. Quantizers are never folded, or INT4 and INT8
weights would become floats; 4-bit values and text are left alone.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from ..base import Pass, PassResult, Tally, numpy_dtype
from ..deferred import Array, is_packed, stored_bytes, values_of
from ..editing import consumers, is_graph_input, is_graph_output, producer, unlink
from ..matching import is_foreign
from ..type_inference import Axis, infer_types
from .op_kinds import is_pure


class FoldConstants(Pass):
    """Constant nodes to their values.

    Args:
        limit: largest constant, in bytes, that is read or made.
    """

    name = "fold-constants"
    summary = "nodes whose result is known beforehand become constants"

    def __init__(self, limit: int = 64 * 1024) -> None:
        self.limit = limit

    def run(self, graph: gs.Graph) -> PassResult:
        if any(t.dtype is None for node in graph.nodes for t in node.outputs if t.name):
            infer_types(graph)
        tally = Tally()
        refused: dict[int, tuple[gs.Node, str]] = {}
        pending = deque(graph.nodes)
        while pending:
            node = pending.popleft()
            if not node.outputs or not is_pure(node):
                continue
            found = self._evaluate(graph, node)
            if isinstance(found, str):
                refused[id(node)] = node, found
            elif found is not None:
                pending.extend(_readers_of(node))
                _fold(node, found)
                tally.rewrote()
        for node, reason in refused.values():
            tally.refuse(node, reason)
        return tally.result()

    def _evaluate(self, graph: gs.Graph, node: gs.Node) -> list[Array] | str | None:
        """Values of the outputs; a reason to leave the node; None if it is not constant."""
        axes = _known_axes(graph, node)
        if axes is None and not all(_is_known(graph, tensor) for tensor in node.inputs):
            return None
        for tensor in node.outputs:
            if is_graph_output(graph, tensor):
                return f"its result {tensor.name!r} is an output of the graph"
        if axes is not None:
            return [axes]
        for tensor in (*node.inputs, *node.outputs):
            problem = None if tensor.is_empty() else _type_problem(tensor)
            if problem is not None:
                return problem
        for tensor in node.inputs:
            if not tensor.is_empty() and self._is_large(tensor.shape, tensor.dtype):
                return f"{tensor.name!r} has more than {self.limit} bytes"
        try:
            model = _alone(graph, node)
            problem = self._size_problem(model)
            results = [] if problem else ReferenceEvaluator(model).run(None, {})
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"ONNX's reference evaluator cannot run it ({error})"
        return problem or [np.asarray(result) for result in results]

    def _size_problem(self, model: onnx.ModelProto) -> str | None:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        for value in inferred.output:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            if not all(
                dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim
            ) or not value.type.tensor_type.HasField("shape"):
                return f"the size of {value.name!r} is not known beforehand"
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if self._is_large(shape, kind):
                return f"its result {value.name!r} would have more than {self.limit} bytes"
        return None

    def _is_large(self, shape: list[int], dtype: object) -> bool:
        return stored_bytes(shape, dtype) > self.limit


def _type_problem(tensor: gs.Tensor) -> str | None:
    """Why values of a tensor's dtype cannot be read or written here."""
    if tensor.dtype is None:
        return f"the type of {tensor.name!r} is not known"
    dtype = np.dtype(numpy_dtype(tensor))
    if dtype.kind == "O":
        return f"{tensor.name!r} holds text"
    return f"{tensor.name!r} holds {dtype} values" if is_packed(dtype) else None


def _is_known(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    if tensor.is_empty():
        return True
    return isinstance(tensor, gs.Constant) and not is_graph_input(graph, tensor)


def _alone(graph: gs.Graph, node: gs.Node) -> onnx.ModelProto:
    """A model of one node and its constants."""
    known = {t.name: gs.Constant(t.name, values_of(t)) for t in node.inputs if t.name}
    inputs = [known.get(tensor.name) or gs.Variable.empty() for tensor in node.inputs]
    outputs = [gs.Variable(tensor.name, tensor.dtype) for tensor in node.outputs]
    attrs = dict(node.attrs)
    copy = gs.Node(node.op, node.name, attrs, inputs, outputs, domain=node.domain)
    wanted = [tensor for tensor in outputs if tensor.name]
    model: onnx.ModelProto = gs.export_onnx(gs.Graph([copy], [], wanted, opset=graph.opset))
    return model


def _readers_of(node: gs.Node) -> list[gs.Node]:
    """Nodes that may be constant once ``node`` is."""
    return [reader for tensor in node.outputs for reader in consumers(tensor)]


def _fold(node: gs.Node, results: list[Array]) -> None:
    outputs = [tensor for tensor in node.outputs if tensor.name]
    dtypes = [tensor.dtype and numpy_dtype(tensor) for tensor in outputs]
    unlink(node)
    for tensor, values, dtype in zip(outputs, results, dtypes, strict=True):
        tensor.to_constant(values if dtype is None else values.astype(dtype, copy=False))


def _known_axes(graph: gs.Graph, node: gs.Node) -> Array | None:
    """What a node gives that asks for axes which are known; None for any other."""
    axes: list[Axis] | None = None
    if node.op == "Shape":
        axes = _axes_of_shape(node)
    elif node.op in ("Gather", "Slice"):
        source = producer(node.inputs[0])
        if source is None or source.op != "Shape" or is_foreign(source):
            return None
        whole = _axes_of_shape(source)
        return None if whole is None else _pick(graph, node, whole)
    if axes is None or not all(isinstance(axis, int) for axis in axes):
        return None
    return np.array(axes, np.int64)


def _axes_of_shape(node: gs.Node) -> list[Axis] | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    return list(shape)[node.attrs.get("start", 0) : node.attrs.get("end")]


def _pick(graph: gs.Graph, node: gs.Node, axes: list[Axis]) -> Array | None:
    """``Gather`` or ``Slice`` of a shape, if all that it takes is known."""
    steering = node.inputs[1:]
    if not all(_is_known(graph, tensor) for tensor in steering):
        return None
    values = [None if tensor.is_empty() else values_of(tensor) for tensor in steering]
    whole = np.array(axes, object)
    if node.op == "Gather":
        indices = values[0]
        if indices is None or np.any(indices >= len(axes)) or np.any(indices < -len(axes)):
            return None
        taken = np.asarray(whole[indices], object)
    else:
        bounds = [int(v[0]) if v is not None else None for v in values]
        step = bounds[3] if len(bounds) > 3 else None
        taken = whole[slice(bounds[0], bounds[1], step)]
    if not all(isinstance(axis, int) for axis in taken.reshape(-1)):
        return None
    return taken.astype(np.int64)
