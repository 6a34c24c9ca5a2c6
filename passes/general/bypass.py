"""Let what reads a node read what the node reads."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from ..editing import is_graph_input, is_graph_output, producer, replace_tensor, unlink


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> str | None:
    """Replace a node's first output by ``source``, which is equal; a reason if that cannot be.

    An output of the graph keeps its name, so ``source`` must be free to take it.
    """
    result = node.outputs[0]
    is_output = is_graph_output(graph, result)
    if is_output and producer(source) is None:
        return f"{result.name!r} is an output of the graph, but no node makes {source.name!r}"
    if is_output and is_graph_output(graph, source):
        return f"{result.name!r} and {source.name!r} are both outputs of the graph"
    if isinstance(source, gs.Variable) and not is_graph_input(graph, source):
        take_type(graph, source, result)
    replace_tensor(graph, result, source)
    unlink(node)
    return None


def take_type(graph: gs.Graph, new: gs.Variable, old: gs.Tensor) -> None:
    """Record of ``new`` what is recorded of ``old``, whose place it takes.

    What an output of the graph is called and how its axes are, its caller knows: its record
    stands, whatever is recorded of ``new``.
    """
    if new.dtype is None:
        new.dtype = old.dtype
    if new.shape is None or (is_graph_output(graph, old) and old.shape is not None):
        new.shape = old.shape
