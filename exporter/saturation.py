"""Whether sums of 8-bit products may saturate in a written graph on a CPU without VNNI.

Such a CPU adds two products of 8 bits in 16 signed bits. ONNX Runtime can be told to use
kernels that do not (``session.x64quantprecision``), and then reads every 8-bit weight while it
loads, which takes seconds for an encoder. ``use-integer-matmul`` writes weights that cannot
saturate; where nothing else multiplies integers, ONNX Runtime need not look.
"""

from __future__ import annotations

import onnx

INTEGERS = "QuantizeLinear"
SAFE = "MatMulIntegerToFloat"
"""Written by ``use-integer-matmul`` alone, with weights of -64 to 64."""

_FUSED_BEHIND = frozenset({INTEGERS, "Relu", "Clip"})
"""What ONNX Runtime makes one integer convolution with, where it stands behind."""


def may_saturate(graph: onnx.GraphProto) -> bool:
    """Whether quantized activations go into anything but products that cannot saturate."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def is_float_convolution(node: onnx.NodeProto) -> bool:
        behind = {reader.op_type for reader in readers.get(node.output[0], ())}
        return node.op_type == "Conv" and not behind & _FUSED_BEHIND

    def is_safe(node: onnx.NodeProto) -> bool:
        if node.op_type == "DequantizeLinear":
            return all(map(is_float_convolution, readers.get(node.output[0], ())))
        return node.op_type == SAFE

    return not all(
        is_safe(reader)
        for node in graph.node
        if node.op_type == INTEGERS
        for reader in readers.get(node.output[0], ())
    )
