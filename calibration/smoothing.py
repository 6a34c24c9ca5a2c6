"""Move scales of channels from activations into weights, exactly.

    (x / s) (diag(s) W) = x W        for any positive s [K]

A channel of x that is much larger than the others makes a bad grid for all of them; divided
by s it does not, and W takes the factor. The division is free where what makes x takes it:

- RMSNorm, whose weight was folded away: a weight 1/s is put back, which TensorRT fuses;
- a product with a constant, such as RMSNorm's weight where it stands: the constant is divided;
- LayerNormalization: its scale (and shift) are divided;
- the gated product ``act(g) * u``: u is linear in its projection, whose columns are divided.

What only a softmax or an activation makes takes no scale, so the attention's output projection
and the encoder's second MLP layer have no site. (Attention's values could be scaled, but they
are the cache, which the prompt's shipped prefix holds in the model's own units.)

SmoothQuant (arXiv 2211.10438) and AWQ (arXiv 2306.00978) choose s; this moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.base import Pass, PassResult, Tally
from mvlm_export.passes.deferred import Array, derive
from mvlm_export.passes.editing import (
    consumers,
    fresh_name,
    insert_node,
    is_graph_input,
    is_graph_output,
    producer,
)
from mvlm_export.passes.matching import any_, cast, is_op, match_tensor, one_of, op
from mvlm_export.passes.transformer.linear_layers import (
    readers_problem,
    replace_input,
    rewrite_constant,
    weight_problem,
)

from .layers import Layer, find_layers

_X = cast(any_("x"))
_SQUARE = one_of(op("Mul", _X, _X), op("Pow", _X, any_()))
_ROOT = op("Sqrt", op("Add", op("ReduceMean", _SQUARE), any_()))
_RMSNORM = one_of(op("Mul", _X, op("Reciprocal", _ROOT)), op("Div", _X, _ROOT))

Scales = Mapping[str, Array]
"""s, float32 [K], by the name of the site's first layer."""


@dataclass(frozen=True, eq=False)
class SmoothingSite:
    """A tensor whose channels can be scaled.

    Attributes:
        name: of the first layer that reads it.
        tensor: [..., K].
        layers: the linear layers that read it, all its readers.
    """

    name: str
    tensor: gs.Tensor
    layers: tuple[Layer, ...]


def find_sites(graph: gs.Graph) -> list[SmoothingSite]:
    """Every site, in the graph's order."""
    by_input: dict[int, list[Layer]] = {}
    for layer in find_layers(graph):
        if layer.kind == "linear":
            by_input.setdefault(id(layer.inputs[0]), []).append(layer)
    sites = []
    for layers in by_input.values():
        tensor = layers[0].inputs[0]
        whole = readers_problem(graph, tensor) is None
        if whole and len(layers) == len(consumers(tensor)) and _taker(graph, tensor):
            sites.append(SmoothingSite(layers[0].name, tensor, tuple(layers)))
    return sites


class MoveScales(Pass):
    """Divides activations by s and multiplies the weights behind by it.

    Args:
        scales: s by site; sites that are not named are left alone.
    """

    name = "move-scales"
    summary = "scales of channels go from activations into weights"

    def __init__(self, scales: Scales) -> None:
        self.scales = scales

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        sites = {site.name: site for site in find_sites(graph)}
        missing = sorted(set(self.scales) - set(sites))
        if missing:
            raise PassError(f"the graph has no place to scale before {', '.join(missing[:5])}")
        for name, factors in self.scales.items():
            site = sites[name]
            width = site.tensor.shape[-1]
            if factors.shape != (width,) or not _are_positive(factors):
                raise PassError(f"the scales of {name!r} are not {width} positive numbers")
            _divide(graph, site.tensor, (1 / factors).astype(np.float32))
            for layer in site.layers:
                weight = layer.weight
                assert weight is not None
                rewrite_constant(
                    graph, layer.node, weight, "smoothed", _multiply_rows(factors)
                )
            tally.rewrote()
        return tally.result()


def _are_positive(factors: Array) -> bool:
    return bool((np.isfinite(factors) & (factors > 0)).all())


def _multiply_rows(factors: Array) -> Callable[[Array], Array]:
    def multiply(matrix: Array) -> Array:
        scaled: Array = matrix * factors[:, None]
        return scaled

    return multiply


def _divide(graph: gs.Graph, tensor: gs.Tensor, inverse: Array) -> None:
    """Multiply the channels of a site's tensor by ``inverse``, float32 [K]."""
    node = producer(tensor)
    assert node is not None
    _DIVIDERS[_taker(graph, tensor) or ""](graph, node, tensor, inverse)


def _taker(graph: gs.Graph, tensor: gs.Tensor) -> str | None:
    """What takes a division of ``tensor``'s channels; None if nothing does."""
    node = producer(tensor)
    if node is None or is_graph_output(graph, tensor):
        return None
    if is_op(node, "LayerNormalization"):
        return "layernorm" if _affine_of(graph, node) else None
    if match_tensor(_RMSNORM, tensor) is not None:
        return "rmsnorm"
    if _factor_of(graph, node, tensor) is not None:
        return "factor"
    return "gate" if _gated_columns(graph, tensor) is not None else None


def _divide_rmsnorm(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, inverse: Array) -> None:
    readers = consumers(tensor)
    stem = f"{tensor.name}.smoothed"
    scaled = insert_node(graph, "Mul", [tensor, inverse], tensor, stem=stem)
    for reader in readers:
        replace_input(reader, tensor, scaled)


def _affine_of(graph: gs.Graph, norm: gs.Node) -> list[int]:
    """Where a LayerNormalization has its scale and shift; empty if one is not constant."""
    given = [index for index, t in enumerate(norm.inputs) if index and not t.is_empty()]
    fixed = all(_is_fixed(graph, norm.inputs[index]) for index in given)
    return given if fixed else []


def _divide_layernorm(
    graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, inverse: Array
) -> None:
    for index in _affine_of(graph, node):
        node.inputs[index] = _multiplied(
            graph, node.inputs[index], f"{node.name}.smoothed_{index}", inverse
        )


def _factor_of(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor) -> int | None:
    """Where a Mul has a constant that can take a factor of each of ``tensor``'s channels."""
    if not is_op(node, "Mul"):
        return None
    for index, (factor, other) in enumerate(zip(node.inputs, node.inputs[::-1], strict=True)):
        fixed = _is_fixed(graph, factor) and len(factor.shape) <= len(other.shape or ())
        if fixed and all(axis == 1 for axis in factor.shape[:-1]):
            return index
    return None


def _divide_factor(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, inverse: Array) -> None:
    index = _factor_of(graph, node, tensor)
    assert index is not None
    factor = node.inputs[index]
    node.inputs[index] = _multiplied(graph, factor, f"{factor.name}.smoothed", inverse)


def _is_fixed(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and not is_graph_input(graph, tensor)


def _multiplied(graph: gs.Graph, old: gs.Constant, stem: str, inverse: Array) -> gs.Constant:
    """A constant times one number a channel; others may go on reading the old one."""
    shape = np.broadcast_shapes(tuple(old.shape), inverse.shape)
    return derive(fresh_name(graph, stem), [old], lambda values: values * inverse, shape)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns of a linear layer's weight that make one factor of a gated product."""

    matmul: gs.Node
    start: int
    stop: int


def _gated_columns(graph: gs.Graph, tensor: gs.Tensor) -> _Columns | None:
    """The projection that ``tensor`` is linear in, where it is a product with a gate."""
    node = producer(tensor)
    if not is_op(node, "Mul") or node.inputs[0] is node.inputs[1]:
        return None
    for part in node.inputs:
        alone = consumers(part) == [node] and not is_graph_output(graph, part)
        found = _columns_of(graph, part) if alone else None
        if found is not None and found.stop - found.start == tensor.shape[-1]:
            return found
    return None


def _columns_of(graph: gs.Graph, part: gs.Tensor) -> _Columns | None:
    """The columns that make ``part``: a linear layer's, all or some that were split off."""
    node, start, width = producer(part), 0, part.shape[-1]
    if is_op(node, "Split"):
        made = node.inputs[0]
        if node.attrs.get("axis", 0) not in (-1, len(made.shape) - 1):
            return None
        if consumers(made) != [node] or is_graph_output(graph, made):
            return None
        for output in node.outputs:
            if output is part:
                break
            start += output.shape[-1]
        node = producer(made)
    if not is_op(node, "MatMul") or weight_problem(graph, node) is not None:
        return None
    return _Columns(node, start, start + width)


def _divide_gate(graph: gs.Graph, node: gs.Node, tensor: gs.Tensor, inverse: Array) -> None:
    columns = _gated_columns(graph, tensor)
    assert columns is not None

    def divide(matrix: Array) -> Array:
        divided: Array = matrix.copy()
        divided[:, columns.start : columns.stop] *= inverse
        return divided

    rewrite_constant(graph, columns.matmul, columns.matmul.inputs[1], "smoothed", divide)


_DIVIDERS: Mapping[str, Callable[[gs.Graph, gs.Node, gs.Tensor, Array], None]] = {
    "rmsnorm": _divide_rmsnorm,
    "layernorm": _divide_layernorm,
    "factor": _divide_factor,
    "gate": _divide_gate,
}
