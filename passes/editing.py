"""Small edits that every pass is made of: names, new nodes, moved consumers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from .deferred import Array

Operand: TypeAlias = "gs.Tensor | Array"


def fresh_name(graph: gs.Graph, stem: str, reserved: Iterable[str] = ()) -> str:
    """``stem``, or ``stem_1`` and so on if a tensor or node has that name.

    A constant that no node reads yet is not seen: name such ones in ``reserved``, or give
    them other stems.
    """
    taken = {tensor.name for tensor in (*graph.inputs, *graph.outputs)} | set(reserved)
    # graph.tensors() sorts and checks, which is three times slower: passes ask often.
    for node in graph.nodes:
        taken.add(node.name)
        taken.update(tensor.name for tensor in node.inputs)
        taken.update(tensor.name for tensor in node.outputs)
    if stem not in taken:
        return stem
    count = 1
    while f"{stem}_{count}" in taken:
        count += 1
    return f"{stem}_{count}"


def insert_node(
    graph: gs.Graph,
    op: str,
    inputs: Sequence[Operand],
    like: gs.Tensor | None = None,
    *,
    shape: Sequence[int | str] | None = None,
    dtype: Any = None,  # noqa: ANN401
    attrs: dict[str, Any] | None = None,
    stem: str | None = None,
    domain: str | None = None,
) -> gs.Variable:
    """Append a node with one output, and give that output.

    Args:
        inputs: tensors; an array becomes a constant named after the node.
        like: a tensor whose shape and dtype the output has, unless ``shape`` or ``dtype`` say
            otherwise. What is left open is inferred after the pass.
        stem: of the names of the node and its output; the operator's if None.

    The graph is sorted when the pass is done, so a node may be appended anywhere.
    """
    name = fresh_name(graph, stem or op.lower())
    shape = like.shape if shape is None and like is not None else shape
    dtype = like.dtype if dtype is None and like is not None else dtype
    output = gs.Variable(name, dtype, None if shape is None else list(shape))
    operands: list[gs.Tensor] = []
    for operand in inputs:
        if isinstance(operand, (np.ndarray, np.generic)):
            made = [tensor.name for tensor in operands]
            operand = gs.Constant(
                fresh_name(graph, f"{name}_const", [name, *made]), np.asarray(operand)
            )
        operands.append(operand)
    node = gs.Node(op, name, dict(attrs or {}), operands, [output], domain=domain)
    graph.nodes.append(node)
    return output


def replace_tensor(graph: gs.Graph, old: gs.Tensor, new: gs.Variable) -> None:
    """Let every consumer of ``old`` use ``new``; a graph output keeps its name.

    Raises:
        PassError: ``old`` is an output, and ``new`` is an input, a constant or another output,
            whose own name would be lost.
    """
    if is_graph_output(graph, old) and (not new.inputs or is_graph_output(graph, new)):
        raise PassError(
            f"the output {old.name!r} cannot become {new.name!r}, which has to stay"
        )
    for consumer in {id(node): node for node in old.outputs}.values():
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = new
    for index, tensor in enumerate(graph.outputs):
        if tensor is old:
            graph.outputs[index] = new
            old.name, new.name = fresh_name(graph, f"{old.name}_before"), old.name


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """Nodes that read a tensor, each once."""
    return list({id(node): node for node in tensor.outputs}.values())


def is_graph_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the graph gives this tensor to its caller."""
    return any(output is tensor for output in graph.outputs)


def is_graph_input(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether the caller gives this tensor to the graph."""
    return any(value is tensor for value in graph.inputs)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def live_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes there are now, one by one; those unlinked meanwhile are left out."""
    for node in list(graph.nodes):
        if node.outputs:
            yield node


def unlink(node: gs.Node) -> None:
    """Take a node out: it reads and makes nothing, and is swept after the pass."""
    node.inputs.clear()
    node.outputs.clear()


def set_opset(graph: gs.Graph, opset: int) -> None:
    """Declare another opset of the standard operators; the nodes stay as they are."""
    others = [d for d in graph.import_domains or () if d.domain not in ("", "ai.onnx")]
    graph.import_domains = [onnx.helper.make_opsetid("", opset), *others]
    graph.opset = opset
