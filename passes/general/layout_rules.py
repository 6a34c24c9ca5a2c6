"""Which operators leave their input as it is, and which pairs are one (``clean_layout``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from ..base import numpy_dtype
from ..deferred import SMALL, Array, is_deferred, values_of
from ..editing import fresh_name, is_graph_input, is_graph_output, producer
from ..matching import is_foreign
from ..type_inference import Axis

_WHOLE = 2**31 - 1
"""A Slice that ends here or later takes all there is."""


@dataclass(frozen=True)
class Merge:
    """A node that may read what ``inner`` reads, once changed so.

    Attributes:
        inner: makes the node's first input.
        attrs: the node's new attributes.
        inputs: its new inputs beyond the first, by index.
    """

    inner: gs.Node
    attrs: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[int, gs.Tensor] = field(default_factory=dict)


Finding: TypeAlias = "Merge | gs.Tensor"
"""How to merge a node with the one before it; or the tensor that it gives unchanged."""

Rule: TypeAlias = Callable[[gs.Graph, gs.Node], "Finding | str | None"]
"""A finding; a sentence why what looked like one is none; None where nothing is to be said."""


def known_values(graph: gs.Graph, tensor: gs.Tensor) -> Array | None:
    """A small constant's values; None for all else."""
    if not isinstance(tensor, gs.Constant) or is_graph_input(graph, tensor):
        return None
    if is_deferred(tensor) or values_of(tensor).nbytes > SMALL:
        return None
    return values_of(tensor)


def same_shape(found: Sequence[Axis] | None, wanted: Sequence[Axis] | None) -> bool:
    """Whether two tensors of equally many elements surely have one shape.

    One axis may be unknown: the others and the number of elements give it.
    """
    if found is None or wanted is None or len(found) != len(wanted):
        return False
    open_axes = [
        (a, b)
        for a, b in zip(found, wanted, strict=True)
        if not (isinstance(a, int) and isinstance(b, int))
    ]
    known = [
        (a, b)
        for a, b in zip(found, wanted, strict=True)
        if isinstance(a, int) and isinstance(b, int)
    ]
    return len(open_axes) <= 1 and all(a == b and a > 0 for a, b in known)


def _previous(graph: gs.Graph, node: gs.Node, ops: Sequence[str]) -> gs.Node | None:
    """The node that makes the first input, if it is one of ``ops``."""
    made = producer(node.inputs[0])
    return made if made is not None and made.op in ops and not is_foreign(made) else None


def _nothing(graph: gs.Graph, node: gs.Node) -> gs.Tensor:
    return node.inputs[0]


def _dropout(graph: gs.Graph, node: gs.Node) -> gs.Tensor | str | None:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        training = known_values(graph, node.inputs[2])
        if training is None or bool(training):
            return "it may be in training mode"
    if len(node.outputs) > 1:
        mask = node.outputs[1]
        if mask.outputs or is_graph_output(graph, mask):
            return f"its mask {mask.name!r} is used"
    return node.inputs[0]


def _cast(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
    x, y = node.inputs[0], node.outputs[0]
    known = x.dtype is not None and y.dtype is not None
    return x if known and numpy_dtype(x) == numpy_dtype(y) else None


def _concat(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _expand(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
    shape, target = node.inputs[0].shape, known_values(graph, node.inputs[1])
    if shape is None or target is None or len(target) > len(shape):
        return None
    own = list(shape)[len(shape) - len(target) :]
    same = all(size in (1, axis) for size, axis in zip(target.tolist(), own, strict=True))
    return node.inputs[0] if same else None


def _slice(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
    given = [None if t.is_empty() else known_values(graph, t) for t in node.inputs[1:]]
    shape, named = node.inputs[0].shape, [not t.is_empty() for t in node.inputs[1:]]
    if shape is None or any(v is None for v, name in zip(given, named, strict=True) if name):
        return None
    starts, ends = given[0], given[1]
    if starts is None or ends is None:
        return None
    axes = given[2] if len(given) > 2 else None
    steps = given[3] if len(given) > 3 else None
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = i if axes is None else axes[i], 1 if steps is None else steps[i]
        size = shape[int(axis)]
        if start != 0 or step != 1 or end < (size if isinstance(size, int) else _WHOLE):
            return None
    return node.inputs[0]


def _neutral(value: float, either: bool) -> Rule:
    """``x op value``, and ``value op x`` if either operand may be the constant."""

    def rule(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
        for x, other in ((0, 1), (1, 0))[: 1 + either]:
            constant = known_values(graph, node.inputs[other])
            shape = node.inputs[x].shape
            if constant is None or shape is None or not np.all(constant == value):
                continue
            if _broadcasts_into(constant.shape, shape):
                return node.inputs[x]
        return None

    return rule


def _broadcasts_into(small: Sequence[int], shape: Sequence[Axis]) -> bool:
    """Whether a constant leaves the shape of what it is broadcast to as it is."""
    if len(small) > len(shape):
        return False
    own = list(shape)[len(shape) - len(small) :]
    return all(size in (1, axis) for size, axis in zip(small, own, strict=True))


def _same_reshape(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
    return node.inputs[0] if same_shape(node.inputs[0].shape, node.outputs[0].shape) else None


def _reshape_twice(graph: gs.Graph, node: gs.Node) -> Finding | str | None:
    inner = _previous(graph, node, ("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
    if inner is None:
        return None
    shape = node.outputs[0].shape
    if same_shape(inner.inputs[0].shape, shape):
        return inner.inputs[0]
    target = known_values(graph, node.inputs[1])
    if target is not None and np.all(target != 0):
        return Merge(inner)
    if shape is None or 0 in shape or sum(not isinstance(axis, int) for axis in shape) > 1:
        return "its shape copies axes of the one before it"
    axes = [axis if isinstance(axis, int) else -1 for axis in shape]
    name = fresh_name(graph, f"{node.outputs[0].name}.shape")
    return Merge(inner, inputs={1: gs.Constant(name, np.array(axes, np.int64))})


def _permutation(node: gs.Node) -> list[int] | None:
    if "perm" in node.attrs:
        return [int(axis) for axis in node.attrs["perm"]]
    shape = node.inputs[0].shape
    return None if shape is None else list(range(len(shape)))[::-1]


def _transpose(graph: gs.Graph, node: gs.Node) -> Finding | None:
    outer = _permutation(node)
    if outer is None:
        return None
    if outer == sorted(outer):
        return node.inputs[0]
    before = _previous(graph, node, ("Transpose",))
    inner = None if before is None else _permutation(before)
    if before is None or inner is None:
        return None
    both = [inner[axis] for axis in outer]
    return before.inputs[0] if both == sorted(both) else Merge(before, {"perm": both})


def _unit_axes(graph: gs.Graph, node: gs.Node) -> list[int] | None:
    """Axes that Squeeze takes out or Unsqueeze puts in, counted in the longer shape."""
    longer = node.inputs[0] if node.op == "Squeeze" else node.outputs[0]
    if len(node.inputs) < 2 or node.inputs[1].is_empty() or longer.shape is None:
        return None
    axes = known_values(graph, node.inputs[1])
    return None if axes is None else sorted(int(axis) % len(longer.shape) for axis in axes)


def _unit_pair(graph: gs.Graph, node: gs.Node) -> gs.Tensor | None:
    other = "Unsqueeze" if node.op == "Squeeze" else "Squeeze"
    before = _previous(graph, node, (other,))
    axes = None if before is None else _unit_axes(graph, node)
    if before is None or axes is None or axes != _unit_axes(graph, before):
        return None
    source: gs.Tensor = before.inputs[0]
    return source


RULES: Mapping[str, tuple[Rule, ...]] = {
    "Identity": (_nothing,),
    "Dropout": (_dropout,),
    "Cast": (_cast,),
    "Concat": (_concat,),
    "Expand": (_expand,),
    "Slice": (_slice,),
    "Mul": (_neutral(1, either=True),),
    "Div": (_neutral(1, either=False),),
    "Reshape": (_same_reshape, _reshape_twice),
    "Transpose": (_transpose,),
    "Squeeze": (_unit_pair,),
    "Unsqueeze": (_unit_pair,),
}
"""Rules by operator; the first that finds something is taken."""
