"""Convert a float32 graph to float16.

Every node computes in float16, except the islands of :mod:`.float16_islands` (softmax with
its mask, RMSNorm's mean of squares, roots, exponentials ...) and nodes whose weights do not
survive float16 (:mod:`.float16_weights`). TensorRT is strongly typed, so the dtype of each
tensor is what its node makes, and a Cast stands where a reader wants the other: one for a
tensor and a direction, shared by its readers. Inputs and outputs become float16, but for
those named.

Values are checked, one weight in memory at a time: a value beyond 65504, a weight that would
be all zeros or turn away from what it was, a divisor that would vanish, is named in the
refusals and stays float32 with its node. NaN in a weight is an error. The float16 weights
themselves are made when the graph is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from ..base import Pass, PassResult, Tally, Tensors, numpy_dtype
from ..deferred import derive, values_of
from ..editing import consumers, is_graph_input, is_graph_output, producer, unlink
from ..general.remove_cast_islands import RemoveCastIslands, is_lossless
from ..matching import describe, is_foreign
from ..type_inference import infer_types
from .float16_islands import BLIND_OPS, find_float32_nodes, is_float32
from .float16_weights import float16_problem

Progress = Callable[[int, int, str], None]
"""Called with (weights checked, weights in all, name)."""

_QUANTIZERS = frozenset({"DequantizeLinear", "QuantizeLinear"})
_DIVISIONS = frozenset({"Div", "Mod"})
_FLOAT_FORMS = frozenset({"sparse_value", "value_float", "value_floats"})


class ConvertToFloat16(Pass):
    """Float16 with float32 islands.

    ``rewritten`` counts the nodes that compute in float16 and did in float32; ``refusals``
    those that would but for a weight, or for want of a float16 form. Islands are neither; in
    a graph that is nothing else, the inputs and outputs that became float16 are counted.

    Args:
        keep_io: inputs and outputs that stay float32, such as ``logits``; names that the graph
            lacks are ignored.
        progress: told of each weight that is checked.
    """

    name = "convert-to-float16"
    summary = "float32 becomes float16, with float32 islands where the range needs them"
    rounding = "float16"

    def __init__(
        self, keep_io: Collection[str] = (), progress: Progress | None = None
    ) -> None:
        self.keep_io = frozenset(keep_io)
        self.progress = progress

    def requires(self, graph: gs.Graph) -> None:
        super().requires(graph)
        for node in graph.nodes:
            if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                raise PassError(
                    f"{describe(node)} holds a graph of its own, which {self.name} does not "
                    "convert. Export the model without control flow."
                )
            forms = _FLOAT_FORMS & node.attrs.keys() if node.op == "Constant" else ()
            if forms:
                raise PassError(
                    f"{describe(node)} holds its numbers as {', '.join(sorted(forms))}, which "
                    f"{self.name} does not read. Run fold-constants before it."
                )

    def run(self, graph: gs.Graph) -> PassResult:
        if any(t.dtype is None for node in graph.nodes for t in node.outputs if t.name):
            infer_types(graph)
        _bind_constant_nodes(graph)
        graph.toposort()
        tally = Tally()
        kept = find_float32_nodes(graph)
        wanted = [n for n in graph.nodes if id(n) not in kept and _computes_float32(n)]
        narrow = self._survivors(graph, wanted, tally)
        changed = len(narrow) or len(self._io_to_convert(graph))
        if changed:
            _Conversion(graph, narrow, self.keep_io).run()
            RemoveCastIslands().run(graph)
        tally.rewrote(changed)
        return tally.result()

    def _io_to_convert(self, graph: gs.Graph) -> list[gs.Tensor]:
        every = (*graph.inputs, *graph.outputs)
        free = [t for t in every if not _is_default(graph, t) and t.name not in self.keep_io]
        return [tensor for tensor in free if is_float32(tensor)]

    def _survivors(self, graph: gs.Graph, nodes: list[gs.Node], tally: Tally) -> list[gs.Node]:
        """The nodes that can compute in float16; the others are refused."""
        problems: dict[int, str | None] = {}
        for node in nodes:
            problems[id(node)] = _form_problem(graph, node)
        checks = _weights_to_check(graph, [n for n in nodes if problems[id(n)] is None])
        for index, (constant, readers) in enumerate(checks, 1):
            exact = any(_needs_each_value(node, constant) for node in readers)
            problem = float16_problem(constant.name, values_of(constant), exact)
            for node in readers:
                problems[id(node)] = problems[id(node)] or problem
            if self.progress is not None:
                self.progress(index, len(checks), constant.name)
        for node in nodes:
            if problems[id(node)] is not None:
                tally.refuse(node, f"it stays float32: {problems[id(node)]}")
        return [node for node in nodes if problems[id(node)] is None]

    def ensures(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            problem = _cast_problem(graph, node) if node.op == "Cast" else None
            if problem is not None:
                raise PassError(
                    f"{describe(node)} {problem}. Run remove-dead-code and "
                    f"remove-cast-islands before {self.name}"
                )

    def feeds_before(self, feeds: Tensors) -> Tensors:
        """Float16 inputs as the float32 they were; an input that was float16 is not known."""
        return {
            name: values.astype(np.float32) if values.dtype == np.float16 else values
            for name, values in feeds.items()
        }

    def outputs_after(self, outputs: Tensors, feeds: Tensors) -> Tensors:
        """Outputs rounded to float16, but for those that stay float32."""
        return {
            name: values.astype(np.float16)
            if values.dtype == np.float32 and name not in self.keep_io
            else values
            for name, values in outputs.items()
        }


def _bind_constant_nodes(graph: gs.Graph) -> None:
    """Turn Constant nodes of float32 into constants."""
    bound: set[int] = set()
    for node in graph.nodes:
        if node.op == "Constant" and not is_foreign(node) and is_float32(node.outputs[0]):
            (output,) = node.outputs
            values = values_of(node.attrs["value"])
            unlink(node)
            output.to_constant(values)
            bound.add(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in bound]


def _is_default(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether it is a constant that the caller may give instead."""
    return isinstance(tensor, gs.Constant) and is_graph_input(graph, tensor)


def _needs_each_value(node: gs.Node, constant: gs.Constant) -> bool:
    """Whether one bad value of a constant spoils a result, however good the others are."""
    divides = node.op in _DIVISIONS and node.inputs[1] is constant
    return divides or node.op in _QUANTIZERS


def _computes_float32(node: gs.Node) -> bool:
    computed = [tensor for tensor in node.inputs if isinstance(tensor, gs.Variable)]
    return any(is_float32(tensor) for tensor in (*computed, *node.outputs))


def _cast_problem(graph: gs.Graph, node: gs.Node) -> str | None:
    """What is wrong with a Cast between float32 and float16."""
    source, result = node.inputs[0], node.outputs[0]
    if is_graph_output(graph, result) or not (_is_float(source) and _is_float(result)):
        return None
    if not result.outputs:
        return "has no reader"
    twins = [n for n in consumers(source) if n.op == "Cast" and n is not node]
    for twin in twins:
        if numpy_dtype(twin.outputs[0]) == numpy_dtype(result):
            return f"does the same as {describe(twin)}"
    before = producer(source)
    if before is None or before.op != "Cast" or not _is_float(before.inputs[0]):
        return None
    first = numpy_dtype(before.inputs[0])
    undone = first == numpy_dtype(result) and is_lossless(first, numpy_dtype(source))
    return f"undoes {describe(before)}" if undone else None


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and numpy_dtype(tensor) in (np.float16, np.float32)


@lru_cache(maxsize=1024)
def _schema(op: str, opset: int) -> Any:  # noqa: ANN401
    return onnx.defs.get_schema(op, opset, "")


def _slots(graph: gs.Graph, node: gs.Node, side: str) -> dict[int, bool]:
    """Float32 inputs or outputs whose dtype is free, by index: may they be float16?"""
    schema = _schema(node.op, graph.opset)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    formal = getattr(schema, side)
    found = {}
    for index, tensor in enumerate(getattr(node, side)):
        kind = formal[min(index, len(formal) - 1)].type_str
        if is_float32(tensor) and kind in allowed:
            found[index] = "tensor(float16)" in allowed[kind]
    return found


def _form_problem(graph: gs.Graph, node: gs.Node) -> str | None:
    """Why an operator cannot compute in float16 at all."""
    if is_foreign(node):
        return f"{node.op} of {node.domain!r} is no operator of ONNX"
    free = {**_slots(graph, node, "inputs"), **_slots(graph, node, "outputs")}
    if not free or not all(free.values()):
        return f"{node.op} has no float16 form in opset {graph.opset}"
    return None


def _weights_to_check(
    graph: gs.Graph, nodes: list[gs.Node]
) -> list[tuple[gs.Constant, list[gs.Node]]]:
    """Constants that would become float16, each with the nodes that want it so."""
    found: dict[int, tuple[gs.Constant, list[gs.Node]]] = {}
    for node in nodes:
        for index in _slots(graph, node, "inputs"):
            tensor = node.inputs[index]
            if isinstance(tensor, gs.Constant):
                found.setdefault(id(tensor), (tensor, []))[1].append(node)
    return list(found.values())


class _Conversion:
    """Gives every tensor its dtype, and puts casts where readers want another."""

    def __init__(
        self, graph: gs.Graph, narrow: list[gs.Node], keep_io: Collection[str]
    ) -> None:
        self.graph = graph
        self.keep_io = keep_io
        self.inputs = {id(node): set(_slots(graph, node, "inputs")) for node in narrow}
        self.outputs = {id(node): set(_slots(graph, node, "outputs")) for node in narrow}
        self.were_float32 = {id(t) for t in graph.tensors().values() if is_float32(t)}
        self.names = set(graph.tensors()) | {node.name for node in graph.nodes}
        self.made: dict[tuple[int, np.dtype[Any]], gs.Tensor] = {}

    def run(self) -> None:
        """All of it."""
        readers = list(self.graph.nodes)
        for tensor in self.graph.inputs:
            given = isinstance(tensor, gs.Variable) and tensor.name not in self.keep_io
            if given and is_float32(tensor):
                tensor.dtype = np.dtype(np.float16)
        for node in readers:
            for index in self.outputs.get(id(node), ()):
                node.outputs[index].dtype = np.dtype(np.float16)
        for index in range(len(self.graph.outputs)):
            self._type_output(index)
        for node in readers:
            self._type_inputs(node)

    def _type_output(self, index: int) -> None:
        """Give an output of the graph its dtype, by a Cast that takes over its name."""
        output = self.graph.outputs[index]
        dtype = np.dtype(np.float32 if output.name in self.keep_io else np.float16)
        node = producer(output)
        if id(output) not in self.were_float32:
            return
        if node is None:
            self._type_constant_output(index, dtype)
            return
        made = np.dtype(numpy_dtype(output))
        if made == dtype:
            return
        inner = gs.Variable(self._name(f"{output.name}.{made}"), made, output.shape)
        for reader in consumers(output):
            for place, tensor in enumerate(reader.inputs):
                if tensor is output:
                    reader.inputs[place] = inner
        node.outputs[next(i for i, t in enumerate(node.outputs) if t is output)] = inner
        self.were_float32.add(id(inner))
        output.dtype = dtype
        self._cast(inner, output)

    def _type_constant_output(self, index: int, dtype: np.dtype[Any]) -> None:
        """Let a weight made anew take over the name of one that is an output of the graph."""
        output = self.graph.outputs[index]
        constant = isinstance(output, gs.Constant) and not _is_default(self.graph, output)
        if constant and np.dtype(numpy_dtype(output)) != dtype:
            self.graph.outputs[index] = weight = self._as(output, dtype)
            weight.name, output.name = output.name, self._name(f"{output.name}.float32")

    def _type_inputs(self, node: gs.Node) -> None:
        if node.op in BLIND_OPS and not is_foreign(node):
            return
        free = self.inputs.get(id(node), set())
        for index, tensor in enumerate(node.inputs):
            if id(tensor) in self.were_float32:
                dtype = np.dtype(np.float16 if index in free else np.float32)
                if np.dtype(numpy_dtype(tensor)) != dtype:
                    node.inputs[index] = self._as(tensor, dtype)

    def _as(self, tensor: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
        """The tensor in another dtype: a weight made anew, or one Cast for all."""
        found = self.made.get((id(tensor), dtype))
        if found is not None:
            return found
        name = self._name(f"{tensor.name}.{dtype}")
        if isinstance(tensor, gs.Constant) and not is_graph_input(self.graph, tensor):
            self.made[id(tensor), dtype] = weight = derive(
                name, [tensor], lambda values: values, tensor.shape, dtype
            )
            return weight
        return self._cast(tensor, gs.Variable(name, dtype, tensor.shape))

    def _cast(self, tensor: gs.Tensor, result: gs.Tensor) -> gs.Tensor:
        dtype = np.dtype(numpy_dtype(result))
        to = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        node = gs.Node(
            "Cast", self._name(f"{tensor.name}.cast"), {"to": to}, [tensor], [result]
        )
        self.graph.nodes.append(node)
        self.made[id(tensor), dtype] = result
        return result

    def _name(self, stem: str) -> str:
        name, count = stem, 0
        while name in self.names:
            count += 1
            name = f"{stem}_{count}"
        self.names.add(name)
        return name
