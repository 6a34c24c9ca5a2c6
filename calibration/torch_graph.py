"""Run a float32 decoder graph in PyTorch, so that it has gradients.

ONNX Runtime gives values alone. The decoder's exact rewrites leave some twenty operators, and
each is a line here; a graph with another one is refused by name. PyTorch is imported when a
graph is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError
from mvlm_export.passes.deferred import Array, values_of

if TYPE_CHECKING:
    from torch import Tensor

    Operator = Callable[[list[Tensor], Mapping[str, Any]], Any]
    Visitor = Callable[[gs.Node, list[Tensor], Tensor], Tensor]

_INTEGERS = ("int64", "int32")


class TorchGraph:
    """A graph's nodes on PyTorch tensors; holds all its weights in float32.

    Args:
        graph: sorted, opset 20 or newer, no subgraphs.

    Raises:
        PassError: an operator that is not known here.
    """

    def __init__(self, graph: gs.Graph) -> None:
        import torch

        self._torch = torch
        self._nodes = list(graph.nodes)
        self._outputs = [tensor.name for tensor in graph.outputs]
        self._operators = _operators()
        unknown = sorted({node.op for node in self._nodes} - set(self._operators))
        if unknown:
            raise PassError(
                f"Gradients through {', '.join(unknown)} are not known here, so the losses of "
                "this graph cannot be estimated. Measure them: leave --estimate out."
            )
        constants = {
            t.name: t
            for node in graph.nodes
            for t in node.inputs
            if isinstance(t, gs.Constant)
        }
        self._constants = {
            name: torch.from_numpy(np.array(values_of(t))) for name, t in constants.items()
        }

    def run(self, feeds: Mapping[str, Array], visit: Visitor | None = None) -> list[Tensor]:
        """The graph's outputs.

        Args:
            visit: is given each node, its inputs and its first output; what it returns is
                what later nodes read.
        """
        known: dict[str, Tensor] = dict(self._constants)
        known |= {n: self._torch.from_numpy(np.ascontiguousarray(v)) for n, v in feeds.items()}
        for node in self._nodes:
            inputs = [known[t.name] for t in node.inputs if not t.is_empty()]
            made = self._operators[node.op](inputs, node.attrs)
            outputs = list(made) if isinstance(made, (tuple, list)) else [made]
            if visit is not None:
                outputs[0] = visit(node, inputs, outputs[0])
            known |= zip((t.name for t in node.outputs), outputs, strict=True)
        return [known[name] for name in self._outputs]


def _operators() -> dict[str, Operator]:
    import torch

    def axes(tensor: Tensor) -> list[int]:
        return [int(axis) for axis in tensor.reshape(-1)]

    def gather(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        axis, indices = attrs.get("axis", 0), inputs[1].long()
        indices = torch.where(indices < 0, indices + inputs[0].shape[axis], indices)
        rows = inputs[0].index_select(axis, indices.reshape(-1))
        shape = [*inputs[0].shape[:axis], *indices.shape, *inputs[0].shape[axis + 1 :]]
        return rows.reshape(shape)

    def split(inputs: list[Tensor], attrs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        axis = attrs.get("axis", 0)
        if len(inputs) > 1:
            return torch.split(inputs[0], axes(inputs[1]), dim=axis)
        size = -(-inputs[0].shape[axis] // int(attrs["num_outputs"]))
        return torch.split(inputs[0], size, dim=axis)

    def reshape(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        wanted = axes(inputs[1])
        if not attrs.get("allowzero", 0):
            wanted = [inputs[0].shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        return inputs[0].reshape(wanted)

    def unsqueeze(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        rank = inputs[0].dim() + inputs[1].numel()
        found = inputs[0]
        for axis in sorted(axis % rank for axis in axes(inputs[1])):
            found = found.unsqueeze(axis)
        return found

    def squeeze(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        if len(inputs) == 1:
            return inputs[0].squeeze()
        return inputs[0].squeeze(dim=axes(inputs[1]))

    def mean(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        keep = bool(attrs.get("keepdims", 1))
        return inputs[0].mean(dim=axes(inputs[1]), keepdim=keep)

    def cast(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(int(attrs["to"])))
        return inputs[0].to(getattr(torch, dtype.name))

    def shape(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        sizes = list(inputs[0].shape)
        return torch.tensor(sizes[attrs.get("start", 0) : attrs.get("end")])

    def divide(inputs: list[Tensor], attrs: Mapping[str, Any]) -> Tensor:
        whole = not inputs[0].is_floating_point()
        return torch.div(*inputs, rounding_mode="trunc" if whole else None)

    return {
        "Add": lambda x, _: x[0] + x[1],
        "Cast": cast,
        "Concat": lambda x, a: torch.cat(x, dim=a["axis"]),
        "Div": divide,
        "Gather": gather,
        "GreaterOrEqual": lambda x, _: x[0] >= x[1],
        "LessOrEqual": lambda x, _: x[0] <= x[1],
        "MatMul": lambda x, _: x[0] @ x[1],
        "Max": lambda x, _: torch.maximum(*x),
        "Min": lambda x, _: torch.minimum(*x),
        "Mul": lambda x, _: x[0] * x[1],
        "Neg": lambda x, _: -x[0],
        "Pow": lambda x, _: x[0] ** x[1],
        "Range": lambda x, _: torch.arange(*(int(value) for value in x)),
        "Reciprocal": lambda x, _: x[0].reciprocal(),
        "ReduceMean": mean,
        "Reshape": reshape,
        "Shape": shape,
        "Sigmoid": lambda x, _: x[0].sigmoid(),
        "Softmax": lambda x, a: x[0].softmax(dim=a.get("axis", -1)),
        "Split": split,
        "Sqrt": lambda x, _: x[0].sqrt(),
        "Squeeze": squeeze,
        "Sub": lambda x, _: x[0] - x[1],
        "Transpose": lambda x, a: x[0].permute(*a["perm"]),
        "Unsqueeze": unsqueeze,
        "Where": lambda x, _: torch.where(*x),
    }
