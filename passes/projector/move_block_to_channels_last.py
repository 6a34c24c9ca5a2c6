"""Run LDP's inverted residual block (MobileVLM V1) on [B, H, W, C] between its LayerNorms.

The block normalizes over channels, so it is captured with a pair of transposes around each
LayerNorm. What stands between the two is element by element (HardSwish, ReLU, HardSigmoid, the
product with the gates), a mean over the map, or a 1x1 convolution, and a 1x1 convolution is a
matrix product on every pixel:

    T(conv1x1(x)) = T(x) W[:, :, 0, 0]' + b,   T = Transpose(0, 2, 3, 1),
    T(f(x)) = f(T(x)),   T(mean over axes 2, 3) = mean over axes 1, 2 of T(x).

So the transpose behind the first LayerNorm and the one before the second cancel. The three 1x1
convolutions become MatMuls, which weight-only quantization works on. Exact: the same products
and sums. (LDP: arXiv 2312.16886; squeeze-excitation: arXiv 1709.01507.)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from ..base import Pass, PassResult, Tally
from ..deferred import Array, derive, values_of
from ..editing import fresh_name, insert_node, replace_tensor, unlink
from ..matching import Match, any_, constant_problem, find_matches, op

_ACTIVE = op("HardSwish", op("Transpose", any_("x"), bind="enter"), bind="activation")
_SQUEEZED = op("Conv", op("ReduceMean", _ACTIVE, any_("axes"), bind="mean"), bind="squeeze")
_GATES = op("HardSigmoid", op("Conv", op("Relu", _SQUEEZED), bind="excite"), bind="gates")
_PRODUCT = op("Conv", op("Mul", _ACTIVE, _GATES), bind="pointwise")
_PATTERN = op("Transpose", _PRODUCT, bind="leave")
_CONVOLUTIONS = ("squeeze", "excite", "pointwise")
_TO_CHANNELS_FIRST = [0, 3, 1, 2]
_TO_CHANNELS_LAST = [0, 2, 3, 1]


class MoveBlockToChannelsLast(Pass):
    """Activation, squeeze-excitation and 1x1 convolution without transposes."""

    name = "move-block-to-channels-last"
    summary = "LDP's blocks stay channels last, their 1x1 convolutions become MatMuls"
    opsets = range(18, 25)  # ReduceMean's axes are an input since 18.

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        for match in find_matches(graph, _PATTERN):
            problem = _problem(graph, match)
            if problem is None:
                _move(graph, match)
                tally.rewrote()
            else:
                tally.refuse(match["leave"], problem)
        return tally.result()


def _problem(graph: gs.Graph, match: Match) -> str | None:
    for name, wanted in (("enter", _TO_CHANNELS_FIRST), ("leave", _TO_CHANNELS_LAST)):
        found = match[name].attrs.get("perm")
        if found != wanted:
            return f"{match[name].outputs[0].name!r} is transposed by {found}, not {wanted}"
    axes = match["axes"]
    if not isinstance(axes, gs.Constant):
        return f"the axes {axes.name!r} of the mean are computed"
    if sorted(int(axis) % 4 for axis in values_of(axes)) != [2, 3]:
        return f"the mean is over axes {values_of(axes).tolist()}, not the map's"
    if not match["mean"].attrs.get("keepdims", 1):
        return "the mean drops its axes"
    for name in _CONVOLUTIONS:
        problem = _pointwise_problem(graph, match[name])
        if problem is not None:
            return problem
    return match.used_elsewhere(graph)


def _pointwise_problem(graph: gs.Graph, conv: gs.Node) -> str | None:
    """Why a convolution is no matrix product on each pixel; None if it is."""
    weight, attrs = conv.inputs[1], conv.attrs
    problem = constant_problem(graph, weight, conv)
    if problem is not None:
        return problem
    if any(size != 1 for size in weight.shape[2:]):
        return f"the kernel of {conv.name!r} is {list(weight.shape[2:])}, not 1 x 1"
    if attrs.get("group", 1) != 1:
        return f"{conv.name!r} has {attrs['group']} groups"
    if any(stride != 1 for stride in attrs.get("strides", [1])):
        return f"the strides of {conv.name!r} are {list(attrs['strides'])}, not 1"
    if any(attrs.get("pads", [])):
        return f"{conv.name!r} is padded by {list(attrs['pads'])}"
    return None


def _move(graph: gs.Graph, match: Match) -> None:
    """Build the block anew on the LayerNorm's own output."""
    active = _same(graph, match["activation"], match["x"])
    mean = insert_node(
        graph,
        "ReduceMean",
        [active, np.array([1, 2], np.int64)],
        dtype=active.dtype,
        attrs={"keepdims": 1},
    )
    squeezed = _multiply(graph, match["squeeze"], mean)
    excited = _multiply(graph, match["excite"], insert_node(graph, "Relu", [squeezed]))
    gates = _same(graph, match["gates"], excited)
    # One channel may meet several gates, or the reverse: the shape is left to inference.
    gated = insert_node(graph, "Mul", [active, gates], dtype=active.dtype)
    replace_tensor(graph, match.root, _multiply(graph, match["pointwise"], gated))
    for node in match.nodes:
        unlink(node)


def _same(graph: gs.Graph, node: gs.Node, value: gs.Tensor) -> gs.Variable:
    """An element by element operator as it was, on another tensor."""
    return insert_node(graph, node.op, [value], like=value, attrs=dict(node.attrs))


def _multiply(graph: gs.Graph, conv: gs.Node, value: gs.Tensor) -> gs.Variable:
    """A 1x1 convolution as MatMul on [B, H, W, C], perhaps with its bias."""
    weight = conv.inputs[1]

    def matrix(kernel: Array) -> Array:
        return np.ascontiguousarray(kernel[:, :, 0, 0].T)

    name = fresh_name(graph, f"{weight.name}.matrix")
    factor = derive(name, [weight], matrix, [weight.shape[1], weight.shape[0]])
    product = insert_node(
        graph, "MatMul", [value, factor], dtype=value.dtype, stem=f"{conv.name}.matmul"
    )
    if len(conv.inputs) < 3 or conv.inputs[2].is_empty():
        return product
    return insert_node(graph, "Add", [product, conv.inputs[2]], dtype=value.dtype)
