"""Cut a parsed network behind an ONNX node, so that a part of it can be built.

Works on TensorRT's network, as a device has no onnx package. The layers that TensorRT's parser
made of a node carry its name in their metadata. A part is all that some nodes need; its
outputs are the tensors that the rest would have read. What depends on no input (weights, what
is made of them) is never made an output: it goes with the node that reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .errors import EngineError
from .trt_api import TrtObject

_OWNER = re.compile(r"\[ONNX Layer: (.*?)\]")
# These layers write into a network input, and TensorRT demands their result as an output even
# where nothing that is left of the network reads it.
_IN_PLACE = "KV_CACHE_UPDATE"


@dataclass(frozen=True)
class CutNode:
    """An ONNX node behind which a network can be cut.

    Attributes:
        name: of the ONNX node, or of TensorRT's layer where that does not say.
        layer: TensorRT's kind of its last layer, "MATRIX_MULTIPLY".
    """

    name: str
    layer: str


class _NetworkView:
    """Layers of a network by number, in an order in which each follows what it reads."""

    def __init__(self, network: TrtObject) -> None:
        self.network = network
        self.layers = [network.get_layer(index) for index in range(network.num_layers)]
        self.reads = [self._tensors(layer, "input") for layer in self.layers]
        self.makes = [self._tensors(layer, "output") for layer in self.layers]
        self.inputs = {network.get_input(i).name for i in range(network.num_inputs)}
        self.outputs = {network.get_output(i).name for i in range(network.num_outputs)}

    @staticmethod
    def _tensors(layer: TrtObject, side: str) -> list[TrtObject]:
        get = getattr(layer, f"get_{side}")
        found = (get(index) for index in range(getattr(layer, f"num_{side}s")))
        return [tensor for tensor in found if tensor is not None]

    @cached_property
    def sources(self) -> list[list[int]]:
        """For each layer those that make what it reads."""
        maker = {t.name: index for index, made in enumerate(self.makes) for t in made}
        return [[maker[t.name] for t in read if t.name in maker] for read in self.reads]

    @cached_property
    def order(self) -> list[int]:
        """Layers sorted topologically; the parser adds some after their readers."""
        done: dict[int, None] = {}
        entered: set[int] = set()  # a loop of layers must not make one of this
        for start in range(len(self.layers)):
            stack = [start]
            while stack:
                entered.add(stack[-1])
                waiting = [i for i in self.sources[stack[-1]] if i not in entered]
                if waiting:
                    stack.append(waiting[0])
                else:
                    done.setdefault(stack.pop())
        return list(done)

    @cached_property
    def live(self) -> set[int]:
        """Layers whose result depends on an input of the network."""
        found: set[int] = set()
        for index in self.order:
            by_layer = any(source in found for source in self.sources[index])
            if by_layer or any(tensor.name in self.inputs for tensor in self.reads[index]):
                found.add(index)
        return found

    @cached_property
    def nodes(self) -> dict[str, int]:
        """ONNX nodes that depend on an input, in order, with the number of the last layer."""
        found: dict[str, int] = {}
        for index in self.order:
            match = _OWNER.search(getattr(self.layers[index], "metadata", None) or "")
            if match and index in self.live:
                found.pop(match[1], None)
                found[match[1]] = index
        return found

    def needed_by(self, ends: list[int]) -> set[int]:
        """These layers and all that they need."""
        found: set[int] = set()
        stack = list(ends)
        while stack:
            index = stack.pop()
            if index not in found:
                found.add(index)
                stack += self.sources[index]
        return found


def find_nodes(network: TrtObject) -> list[CutNode]:
    """The nodes behind which ``cut_after`` can cut, in the order of the computation."""
    view = _NetworkView(network)
    return [CutNode(name, _kind(view.layers[index])) for name, index in view.nodes.items()]


def cut_after(network: TrtObject, node: str) -> None:
    """Make the network end behind a node, and behind all nodes that come before it.

    Raises:
        EngineError: there is no such node.
    """
    view = _NetworkView(network)
    names = list(view.nodes)
    if node not in view.nodes:
        raise EngineError(f"The network has no node {node!r} to be cut behind.")
    ends = [view.nodes[name] for name in names[: names.index(node) + 1]]
    ends += [i for i, layer in enumerate(view.layers) if _kind(layer) == _IN_PLACE]
    kept = view.needed_by(ends)
    read_later = {
        tensor.name
        for index, tensors in enumerate(view.reads)
        for tensor in tensors
        if index not in kept
    }
    wanted = view.outputs | read_later
    for index in reversed(range(network.num_outputs)):
        network.unmark_output(network.get_output(index))
    for index in sorted(kept & view.live):
        for tensor in view.makes[index]:
            if tensor.name in wanted:
                network.mark_output(tensor)


def _kind(layer: TrtObject) -> str:
    return str(getattr(layer.type, "name", layer.type))
