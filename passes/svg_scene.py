"""What is drawn of a graph: which nodes, and what stands in each box."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter

import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from .editing import consumers, is_graph_input, is_graph_output, producer
from .matching import COMMUTATIVE
from .svg_text import (
    Kind,
    attribute_lines,
    constant_lines,
    dtype_text,
    kind_of,
    shorten,
    tensor_text,
)

DEPTH = 3
"""Steps around a node that are drawn if nothing else is asked for."""

HUB = 3
"""A tensor with more readers (a mask, a table of angles) does not lead to all of them."""


@dataclass(frozen=True)
class Pill:
    """A constant beside the box that reads it."""

    lines: tuple[str, ...]
    tooltip: str


@dataclass(frozen=True)
class Box:
    """A node, or a tensor that comes from or goes to the outside.

    Attributes:
        kind: of the operator; None for a tensor.
        outside: a tensor that the drawn part shares with the rest of its graph.
        inputs: how many wires arrive.
        any_order: wires may arrive in any order, as at an Add.
        labels: of the tensors that leave, one an output.
        marked: drawn with a thick border.
    """

    title: str
    lines: tuple[str, ...]
    tooltip: str
    kind: Kind | None = None
    outside: bool = False
    pills: tuple[Pill, ...] = ()
    inputs: int = 0
    any_order: bool = False
    labels: tuple[str, ...] = ()
    marked: bool = False


@dataclass(frozen=True)
class Connection:
    """Output ``port`` of a box to input ``slot`` of another."""

    source: int
    port: int
    target: int
    slot: int


@dataclass(frozen=True)
class Scene:
    """Boxes and what connects them."""

    boxes: tuple[Box, ...]
    connections: tuple[Connection, ...]


def nodes_around(graph: gs.Graph, name: str, depth: int | None = None) -> list[gs.Node]:
    """A part of a graph, in the graph's order.

    Args:
        name: of a node or tensor; or a pattern such as ``model.layers.0.*``, for all nodes of
            that name or that read a tensor of that name, and all that lies between them.
        depth: how many steps farther; 3 if None, and 0 for a pattern.

    Raises:
        PassError: there is none of that name.
    """
    is_pattern = any(sign in name for sign in "*?")
    starts = _between(_matching(graph, name)) if is_pattern else _starts(graph, name)
    if not starts:
        raise PassError(_no_such(graph, name))
    known = {id(node): node for node in starts}
    rim = starts
    for _ in range(default_depth(name) if depth is None else depth):
        found = [other for node in rim for other in _neighbours(node)]
        rim = list({id(node): node for node in found if id(node) not in known}.values())
        known |= {id(node): node for node in rim}
    return [node for node in graph.nodes if id(node) in known]


def default_depth(name: str) -> int:
    """Steps around a node, or around all that a pattern names."""
    return 0 if any(sign in name for sign in "*?") else DEPTH


def _starts(graph: gs.Graph, name: str) -> list[gs.Node]:
    nodes = [node for node in graph.nodes if node.name == name]
    tensor = graph.tensors().get(name)
    if nodes or tensor is None:
        return nodes
    made = producer(tensor)
    return [*([made] if made is not None else []), *consumers(tensor)]


def _matching(graph: gs.Graph, pattern: str) -> list[gs.Node]:
    return [
        node
        for node in graph.nodes
        if fnmatchcase(node.name, pattern)
        or any(fnmatchcase(tensor.name, pattern) for tensor in node.inputs)
    ]


def _between(nodes: list[gs.Node]) -> list[gs.Node]:
    """The nodes, and those on a path from one of them to another."""
    below = _reached(nodes, lambda node: [r for t in node.outputs for r in consumers(t)])
    above = _reached(nodes, lambda node: [m for t in node.inputs if (m := producer(t))])
    return [node for key, node in below.items() if key in above]


def _reached(
    starts: list[gs.Node], step: Callable[[gs.Node], list[gs.Node]]
) -> dict[int, gs.Node]:
    known = {id(node): node for node in starts}
    pending = list(starts)
    while pending:
        for other in step(pending.pop()):
            if id(other) not in known:
                known[id(other)] = other
                pending.append(other)
    return known


def _no_such(graph: gs.Graph, name: str) -> str:
    names = [*(node.name for node in graph.nodes), *graph.tensors()]
    close = difflib.get_close_matches(name, names, 5, 0.5)
    close = close or [other for other in names if name and name in other][:5]
    hint = f" Close names: {', '.join(dict.fromkeys(close))}." if close else ""
    return (
        f"The graph {graph.name!r} has no node or tensor {name!r}.{hint} Give a name as it "
        "stands in the graph, or a pattern such as 'model.layers.0.*'."
    )


def _neighbours(node: gs.Node) -> list[gs.Node]:
    makers = [made for tensor in node.inputs if (made := producer(tensor)) is not None]
    readers = [
        reader
        for tensor in node.outputs
        if len(consumers(tensor)) <= HUB
        for reader in consumers(tensor)
    ]
    return makers + readers


class _Builder:
    """Boxes and connections as they are found."""

    def __init__(self, graph: gs.Graph, nodes: Sequence[gs.Node]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.drawn = {id(node) for node in nodes}
        self.boxes: list[Box] = []
        self.connections: list[Connection] = []
        self.sources: dict[int, tuple[int, int]] = {}

    def add_sources(self) -> None:
        """A box for each tensor that comes from outside."""
        for node in self.nodes:
            for tensor in _arriving(node):
                made = producer(tensor)
                inside = made is not None and id(made) in self.drawn
                if not inside and id(tensor) not in self.sources:
                    given = is_graph_input(self.graph, tensor)
                    self.sources[id(tensor)] = (len(self.boxes), 0)
                    self.boxes.append(_tensor_box(tensor, outside=not given, leaves=True))

    def add_nodes(self, marked: Collection[int]) -> None:
        first = len(self.boxes)
        for place, node in enumerate(self.nodes):
            for port, tensor in enumerate(node.outputs):
                self.sources[id(tensor)] = (first + place, port)
        for node in self.nodes:
            target = len(self.boxes)
            for slot, tensor in enumerate(_arriving(node)):
                source, port = self.sources[id(tensor)]
                self.connections.append(Connection(source, port, target, slot))
            self.boxes.append(_node_box(node, id(node) in marked))

    def add_sinks(self) -> None:
        """A box for each tensor that the caller or a node outside gets."""
        for node in self.nodes:
            for tensor in node.outputs:
                given = is_graph_output(self.graph, tensor)
                outside = any(id(reader) not in self.drawn for reader in consumers(tensor))
                if given or outside:
                    source, port = self.sources[id(tensor)]
                    self.connections.append(Connection(source, port, len(self.boxes), 0))
                    self.boxes.append(_tensor_box(tensor, outside=not given, leaves=False))


def build_scene(
    graph: gs.Graph, nodes: Sequence[gs.Node], marked: Collection[int] = ()
) -> Scene:
    """Boxes for ``nodes`` and for the tensors that come in and go out.

    Args:
        marked: ids of nodes to draw with a thick border.

    Raises:
        PassError: the nodes make a cycle: they have no order from top to bottom.
    """
    builder = _Builder(graph, nodes)
    builder.add_sources()
    builder.add_nodes(marked)
    builder.add_sinks()
    _check_order(builder)
    return Scene(tuple(builder.boxes), tuple(builder.connections))


def _check_order(builder: _Builder) -> None:
    above: dict[int, list[int]] = {}
    for item in builder.connections:
        above.setdefault(item.target, []).append(item.source)
    try:
        TopologicalSorter(above).prepare()
    except CycleError as error:
        boxes = (builder.boxes[index].tooltip for index in error.args[1])
        raise PassError(
            f"{builder.graph.name or 'The graph'} cannot be drawn: its nodes make a cycle, "
            f"{' → '.join(boxes)}. Export the model again."
        ) from error


def _arriving(node: gs.Node) -> list[gs.Tensor]:
    """What a node reads, less constants and inputs left out."""
    return [
        tensor
        for tensor in node.inputs
        if not tensor.is_empty() and not isinstance(tensor, gs.Constant)
    ]


def _node_box(node: gs.Node, marked: bool) -> Box:
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    pills = tuple(Pill(constant_lines(c), _tooltip(c)) for c in constants)
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return Box(
        title=node.op,
        lines=(shorten(name, 30), *attribute_lines(node)),
        tooltip=f"{node.domain + '.' if node.domain else ''}{node.op} {name}",
        kind=kind_of(node),
        pills=pills,
        inputs=len(_arriving(node)),
        any_order=node.op in COMMUTATIVE,
        labels=tuple(tensor_text(tensor) for tensor in node.outputs),
        marked=marked,
    )


def _tensor_box(tensor: gs.Tensor, outside: bool, leaves: bool) -> Box:
    dtype = dtype_text(tensor)
    return Box(
        title=shorten(tensor.name, 34),
        lines=() if outside or not dtype else (dtype,),
        tooltip=_tooltip(tensor),
        outside=outside,
        inputs=0 if leaves else 1,
        labels=(tensor_text(tensor),) if leaves else (),
    )


def _tooltip(tensor: gs.Tensor) -> str:
    return f"{tensor.name} {dtype_text(tensor)} {tensor_text(tensor)}"
