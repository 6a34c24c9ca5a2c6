"""A small matcher of sub-graphs: patterns are trees that grow from an output to its inputs.

``op("Add", op("Conv", any_("x"), const("w"), bind="conv"), any_("x"))`` matches a
convolution with a skip: a name bound twice must be the same tensor (a diamond), and the
operands of Add and Mul may stand in either order. ``cast(...)`` matches with or without a Cast
in front.

A pattern says what a place looks like; whether it may be rewritten (the weight is a constant,
nobody else reads it, nothing in between is used elsewhere) is asked of the match, and answered
with a sentence that becomes the refusal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any, TypeAlias, TypeGuard

import onnx_graphsurgeon as gs

from .editing import consumers, is_graph_input, is_graph_output, live_nodes, producer

COMMUTATIVE = frozenset({"Add", "Mul", "Max", "Min", "And", "Or", "Xor", "Equal", "Sum"})


@dataclass(frozen=True)
class AnyTensor:
    """Any tensor, bound to a name."""

    bind: str | None


@dataclass(frozen=True)
class ConstTensor:
    """A constant, bound to a name."""

    bind: str | None


@dataclass(frozen=True)
class Op:
    """A node of one of ``types`` whose inputs match ``inputs``.

    Attributes:
        inputs: patterns of the leading inputs; what the node has beyond them is not looked at,
            unless ``exact``.
        bind: name of the node in the match.
        output: which of the node's outputs; None for any.
        exact: the node must have as many inputs as there are patterns.
    """

    types: tuple[str, ...]
    inputs: tuple[Pattern, ...]
    bind: str | None = None
    output: int | None = 0
    exact: bool = False


@dataclass(frozen=True)
class MaybeCast:
    """A pattern, perhaps behind a Cast whose node is bound to a name."""

    pattern: Pattern
    bind: str | None


@dataclass(frozen=True)
class OneOf:
    """The first of several patterns that matches."""

    patterns: tuple[Pattern, ...]


Pattern: TypeAlias = "AnyTensor | ConstTensor | Op | MaybeCast | OneOf"


def any_(bind: str | None = None) -> AnyTensor:
    """Any tensor."""
    return AnyTensor(bind)


def const(bind: str | None = None) -> ConstTensor:
    """A constant."""
    return ConstTensor(bind)


def op(
    types: str | Sequence[str],
    *inputs: Pattern,
    bind: str | None = None,
    output: int | None = 0,
    exact: bool = False,
) -> Op:
    """A node; see :class:`Op`."""
    names = (types,) if isinstance(types, str) else tuple(types)
    return Op(names, inputs, bind, output, exact)


def cast(pattern: Pattern, bind: str | None = None) -> MaybeCast:
    """A pattern with or without a Cast in front of its output."""
    return MaybeCast(pattern, bind)


def one_of(*patterns: Pattern) -> OneOf:
    """Alternatives, tried in order."""
    return OneOf(patterns)


@dataclass(frozen=True)
class Match:
    """Where a pattern was found.

    Attributes:
        root: the tensor it was matched on.
        nodes: every matched node, root first.
        bound: nodes and tensors by the names that the pattern gives them.
    """

    root: gs.Tensor
    nodes: tuple[gs.Node, ...]
    bound: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401
        return self.bound[name]

    def __contains__(self, name: str) -> bool:
        return name in self.bound

    def used_elsewhere(self, graph: gs.Graph) -> str | None:
        """Why the inner tensors cannot vanish: one is read outside the match; else None."""
        inside = {id(node) for node in self.nodes}
        for node in self.nodes:
            for tensor in node.outputs:
                if tensor is self.root:
                    continue
                if is_graph_output(graph, tensor):
                    return f"{tensor.name!r} inside it is also an output of the graph"
                for reader in consumers(tensor):
                    if id(reader) not in inside:
                        return f"{tensor.name!r} inside it is also read by {describe(reader)}"
        return None


class _Matching:
    """One attempt; bindings are undone when an alternative fails."""

    def __init__(self) -> None:
        self.bound: dict[str, Any] = {}
        self.nodes: list[gs.Node] = []

    def tensor(self, pattern: Pattern, tensor: gs.Tensor) -> bool:
        if isinstance(pattern, AnyTensor):
            return self._bind(pattern.bind, tensor)
        if isinstance(pattern, ConstTensor):
            return isinstance(tensor, gs.Constant) and self._bind(pattern.bind, tensor)
        if isinstance(pattern, OneOf):
            return any(self._attempt(choice, tensor) for choice in pattern.patterns)
        if isinstance(pattern, MaybeCast):
            node = producer(tensor)
            if node is not None and node.op == "Cast":
                mark = self._mark()
                self.nodes.append(node)
                if self._bind(pattern.bind, node) and self.tensor(
                    pattern.pattern, node.inputs[0]
                ):
                    return True
                self._undo(mark)
            return self._attempt(pattern.pattern, tensor)
        return self._op(pattern, tensor)

    def _op(self, pattern: Op, tensor: gs.Tensor) -> bool:
        node = producer(tensor)
        if node is None or node.op not in pattern.types or is_foreign(node):
            return False
        if pattern.output is not None and node.outputs[pattern.output] is not tensor:
            return False
        count = len(pattern.inputs)
        if len(node.inputs) < count or (pattern.exact and len(node.inputs) != count):
            return False
        mark = self._mark()
        orders: Iterator[tuple[gs.Tensor, ...]] = iter([tuple(node.inputs[:count])])
        if node.op in COMMUTATIVE and len(node.inputs) == count:
            orders = permutations(node.inputs)
        for order in orders:
            if not any(node is seen for seen in self.nodes):
                self.nodes.append(node)
            if self._bind(pattern.bind, node) and all(
                self.tensor(part, value)
                for part, value in zip(pattern.inputs, order, strict=True)
            ):
                return True
            self._undo(mark)
        return False

    def _attempt(self, pattern: Pattern, tensor: gs.Tensor) -> bool:
        mark = self._mark()
        if self.tensor(pattern, tensor):
            return True
        self._undo(mark)
        return False

    def _bind(self, name: str | None, value: Any) -> bool:  # noqa: ANN401
        if name is None:
            return True
        if name in self.bound:
            return self.bound[name] is value
        self.bound[name] = value
        return True

    def _mark(self) -> tuple[int, int]:
        return len(self.bound), len(self.nodes)

    def _undo(self, mark: tuple[int, int]) -> None:
        while len(self.bound) > mark[0]:
            self.bound.popitem()
        del self.nodes[mark[1] :]


def match_tensor(pattern: Pattern, tensor: gs.Tensor) -> Match | None:
    """The match of a pattern that ends in ``tensor``; None if there is none.

    Operands of commutative nodes are tried in every order, the first that fits is taken; an
    inner choice is not tried again when a later operand fails, so let a pattern's bindings be
    decided by what stands nearest to its root.
    """
    attempt = _Matching()
    if not attempt.tensor(pattern, tensor):
        return None
    return Match(tensor, tuple(attempt.nodes), attempt.bound)


def find_matches(graph: gs.Graph, pattern: Pattern) -> Iterator[Match]:
    """Every match, each found in the graph as it is when it is asked for."""
    for node in live_nodes(graph):
        for tensor in list(node.outputs):
            found = match_tensor(pattern, tensor)
            if found is not None:
                yield found


def is_foreign(node: gs.Node) -> bool:
    """Whether a node's operator is not one of ONNX itself."""
    return node.domain not in (None, "", "ai.onnx")


def is_op(node: gs.Node | None, *types: str) -> TypeGuard[gs.Node]:
    """Whether there is a node, and it is one of ONNX's own operators of ``types``."""
    return node is not None and node.op in types and not is_foreign(node)


def describe(node: gs.Node) -> str:
    """A node for a message: ``MatMul 'matmul_3'``; without a name, by its output's."""
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return f"{node.op} {name!r}"


def constant_problem(graph: gs.Graph, tensor: gs.Tensor, *readers: gs.Node) -> str | None:
    """Why a weight cannot be rewritten in place for ``readers``; None if it can.

    It must be a constant, not given by the caller, and read by nobody but ``readers``.
    """
    if is_graph_input(graph, tensor):
        return f"the weight {tensor.name!r} is an input of the graph"
    if not isinstance(tensor, gs.Constant):
        made = producer(tensor)
        by = f"computed by {describe(made)}" if made is not None else "not a constant"
        return f"the weight {tensor.name!r} is {by}"
    allowed = {id(node) for node in readers}
    for node in consumers(tensor):
        if id(node) not in allowed:
            return f"the weight {tensor.name!r} is shared with {describe(node)}"
    if is_graph_output(graph, tensor):
        return f"the weight {tensor.name!r} is also an output of the graph"
    return None
