"""Fold the normalisation of pixels into the patch convolution.

The image processor gives x = (p / 255 - mean_c) / std_c for raw pixels p of channel c, and the
patch convolution is linear, so for a convolution without padding

    W * x + b = W' * (p / 256) + b',   W'[o,c] = W[o,c] 256 / (255 std_c),
    b'[o] = b[o] - sum_{c,i,j} W[o,c,i,j] mean_c / std_c.

With padding it does not hold: a zero of x is the mean colour, a zero of p is black. The host
then sends uint8 pixels, a quarter of the bytes, and computes nothing per pixel. Dividing by
256 is exact in every float type, and keeps the weights about as large as they were: 256 times
smaller, up to half of them would leave float16's normal range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from mvlm_export.engines.errors import PassError

from ..base import Pass, PassResult, Tally, Tensors
from ..deferred import Array, derive
from ..editing import consumers, fresh_name, insert_node, is_graph_output
from ..matching import constant_problem, describe, is_op

STEP = 1 / 256
"""What uint8 pixels are multiplied by: a power of two, so exact."""


@dataclass(frozen=True)
class FoldPixelNormalization(Pass):
    """A float image input to a uint8 one.

    Attributes:
        mean: of each channel, for pixels from 0 to 1.
        std: of each channel.
        input_name: the image input, [B, channels, H, W].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_name: str = "pixel_values"

    name = "fold-pixel-normalization"
    summary = "pixels arrive as uint8; their mean and deviation go into the patch convolution"

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise PassError(
                f"{self.name} got the mean {self.mean} and the deviation {self.std}: give "
                "one of each a channel, deviations above 0, as preprocessor_config.json does."
            )

    def run(self, graph: gs.Graph) -> PassResult:
        tally = Tally()
        pixels = next((t for t in graph.inputs if t.name == self.input_name), None)
        readers = consumers(pixels) if pixels is not None else []
        convs = [node for node in readers if is_op(node, "Conv")]
        if pixels is None or not convs or pixels.dtype == np.uint8:
            return tally.result()
        problem = self._problem(graph, pixels, convs[0])
        if problem is None:
            self._fold(graph, pixels, convs[0])
            tally.rewrote()
        else:
            tally.refuse(convs[0], problem)
        return tally.result()

    def feeds_before(self, feeds: Tensors) -> Tensors:
        """Normalise as the image processor did."""
        column = (-1, 1, 1)
        scaled = feeds[self.input_name].astype(np.float64) / 255
        normal = (scaled - np.reshape(self.mean, column)) / np.reshape(self.std, column)
        return {**feeds, self.input_name: normal.astype(np.float32)}

    def _problem(self, graph: gs.Graph, pixels: gs.Variable, conv: gs.Node) -> str | None:
        for reader in consumers(pixels):
            if reader is not conv and not is_op(reader, "Shape"):
                return f"{pixels.name!r} is also read by {describe(reader)}"
        if is_graph_output(graph, pixels):
            return f"{pixels.name!r} is also an output of the graph"
        if pixels.dtype != np.float32:
            return f"{pixels.name!r} is {pixels.dtype}, not float32"
        if conv.inputs[0] is not pixels:
            return f"{pixels.name!r} is the weight of the convolution"
        for tensor in conv.inputs[1:]:
            problem = None if tensor.is_empty() else constant_problem(graph, tensor, conv)
            if problem is not None:
                return problem
        weight, attrs = conv.inputs[1], conv.attrs
        if attrs.get("group", 1) != 1:
            return f"the convolution has {attrs['group']} groups, not 1"
        if weight.shape[1] != len(self.mean):
            return f"the image has {weight.shape[1]} channels, the mean {len(self.mean)}"
        if attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return f"auto_pad is {attrs['auto_pad']}, and padding is not the mean colour"
        if any(attrs.get("pads", [])):
            return f"the pads are {list(attrs['pads'])}, and padding is not the mean colour"
        return None

    def _fold(self, graph: gs.Graph, pixels: gs.Variable, conv: gs.Node) -> None:
        weight = conv.inputs[1]
        channels = (1, -1, *[1] * (len(weight.shape) - 2))
        mean, std = np.reshape(self.mean, channels), np.reshape(self.std, channels)

        def scale(kernel: Array) -> Array:
            scaled: Array = kernel.astype(np.float64) / (255 * STEP * std)
            return scaled

        def shift(kernel: Array, *bias: Array) -> Array:
            axes = tuple(range(1, kernel.ndim))
            moved: Array = -(kernel.astype(np.float64) * (mean / std)).sum(axes)
            return moved + bias[0] if bias else moved

        old = [weight, *(tensor for tensor in conv.inputs[2:] if not tensor.is_empty())]
        kernel_name = fresh_name(graph, f"{weight.name}.for_bytes")
        bias_name = fresh_name(graph, f"{old[-1].name}.minus_mean")
        kernel = derive(kernel_name, [weight], scale, weight.shape)
        bias = derive(bias_name, old, shift, weight.shape[:1])
        pixels.dtype = np.dtype(np.uint8)
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(weight.dtype))
        floats = insert_node(
            graph, "Cast", [pixels], pixels, dtype=weight.dtype, attrs={"to": to},
            stem=f"{pixels.name}_as_float",
        )  # fmt: skip
        step = np.asarray(STEP, weight.dtype)
        scaled = insert_node(
            graph, "Mul", [floats, step], floats, stem=f"{pixels.name}_scaled"
        )
        conv.inputs = [scaled, kernel, bias]
