"""Words and colours of a drawn graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import onnx
import onnx_graphsurgeon as gs

from .base import numpy_dtype
from .deferred import is_deferred, values_of

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NARROW = frozenset("iljtfrI.,:;'|![]() ")
_WIDE = frozenset("mwMWGOQ@%×")
SHOWN_VALUES = 6
"""Constants of at most so many numbers show them."""


@dataclass(frozen=True)
class Kind:
    """A kind of operator and its colours."""

    title: str
    fill: str
    stroke: str


PRODUCT = Kind("products", "#dbeafe", "#2563eb")
ELEMENTWISE = Kind("element by element", "#dcfce7", "#16a34a")
ACTIVATION = Kind("activation", "#fef3c7", "#d97706")
REDUCTION = Kind("normalization, reduction, pooling", "#fce7f3", "#db2777")
MOVEMENT = Kind("shape and place", "#f1f5f9", "#64748b")
CONVERSION = Kind("dtype and quantization", "#ede9fe", "#7c3aed")
LOGIC = Kind("comparison and logic", "#cffafe", "#0891b2")
OTHER = Kind("other", "#fee2e2", "#dc2626")

_OPERATORS = {
    PRODUCT: "MatMul Gemm Conv ConvTranspose Attention MatMulNBits GroupQueryAttention "
    "MatMulInteger QLinearMatMul ConvInteger QLinearConv Einsum MultiHeadAttention",
    ELEMENTWISE: "Add Sub Mul Div Pow Sqrt Reciprocal Neg Abs Exp Log Sin Cos Min Max Clip "
    "Erf Sum Mean Floor Ceil Round Mod RotaryEmbedding Sign",
    ACTIVATION: "Relu Gelu Sigmoid Tanh Softmax HardSwish HardSigmoid Swish Silu LeakyRelu "
    "Elu FastGelu QuickGelu Softplus LogSoftmax Mish",
    REDUCTION: "LayerNormalization RMSNormalization SimplifiedLayerNormalization "
    "SkipSimplifiedLayerNormalization SkipLayerNormalization BatchNormalization "
    "GroupNormalization InstanceNormalization ReduceMean ReduceSum ReduceMax ReduceMin "
    "AveragePool GlobalAveragePool MaxPool ArgMax TopK CumSum",
    MOVEMENT: "Reshape Transpose Squeeze Unsqueeze Concat Split Slice Gather GatherND "
    "GatherElements ScatterND ScatterElements TensorScatter Expand Tile Flatten Pad Shape "
    "Identity Constant ConstantOfShape Range Resize Size GatherBlockQuantized",
    CONVERSION: "Cast CastLike QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    LOGIC: "Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not Where IsNaN IsInf "
    "Trilu",
}
KINDS = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}

_DTYPE_CODES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
_ATTRIBUTES = (
    "perm",
    "axis",
    "axes",
    "to",
    "kernel_shape",
    "strides",
    "pads",
    "dilations",
    "group",
    "approximate",
    "transA",
    "transB",
    "alpha",
    "beta",
    "epsilon",
    "stash_type",
    "q_num_heads",
    "num_heads",
    "kv_num_heads",
    "is_causal",
    "scale",
    "softcap",
    "K",
    "N",
    "bits",
    "block_size",
    "num_outputs",
    "split_size",
    "keepdims",
    "start",
    "end",
    "mode",
)
_TITLES = {
    "kernel_shape": "kernel",
    "q_num_heads": "heads",
    "num_heads": "heads",
    "kv_num_heads": "kv heads",
}
_PLAIN: dict[str, Any] = {
    "group": 1,
    "approximate": "none",
    "transA": 0,
    "transB": 0,
    "alpha": 1.0,
    "beta": 1.0,
    "stash_type": 1,
    "is_causal": 0,
    "softcap": 0.0,
    "keepdims": 1,
    "start": 0,
}
"""Values that go without saying."""


def kind_of(node: gs.Node) -> Kind:
    """The kind of a node's operator."""
    return KINDS.get(node.op, OTHER)


def clean(text: str) -> str:
    """Text for XML: escaped, and without characters that XML cannot hold."""
    return escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text), {'"': "&quot;"})


def text_width(text: str, size: float) -> float:
    """About how wide a text is in Helvetica."""
    units = sum(0.33 if c in _NARROW else 0.88 if c in _WIDE else 0.58 for c in text)
    return units * size


def shorten(text: str, length: int) -> str:
    """At most ``length`` characters, the middle left out."""
    if len(text) <= length:
        return text
    front = (length - 1) // 3
    return f"{text[:front]}…{text[front + 1 - length :]}"


def shape_text(shape: Sequence[Any] | None) -> str:
    """``[B, 64, 256]``; ``?`` where nothing is known."""
    if shape is None:
        return "?"
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"


def dtype_text(tensor: gs.Tensor) -> str:
    """``float32``; empty if it is not known."""
    code = tensor.dtype
    if isinstance(code, int) and code not in onnx.helper.get_all_tensor_dtypes():
        return f"dtype {code}" if code else ""
    return "" if code is None else str(numpy_dtype(tensor))


def tensor_text(tensor: gs.Tensor) -> str:
    """Shape, and the dtype if it is no float."""
    dtype = dtype_text(tensor)
    suffix = "" if dtype in ("", "float32", "float16") else f" {dtype}"
    return shape_text(tensor.shape) + suffix


def constant_lines(constant: gs.Constant) -> tuple[str, ...]:
    """What a constant is, in one or two lines: a few numbers, or name, dtype and shape."""
    dtype, shape = dtype_text(constant), tuple(constant.shape)
    size = 1
    for axis in shape:
        size *= axis
    if size <= SHOWN_VALUES and len(shape) <= 1 and not is_deferred(constant):
        values = [_number(value) for value in values_of(constant).reshape(-1).tolist()]
        shown = f"[{', '.join(values)}]" if shape else values[0]
        return (f"{dtype} {shown}",)
    return shorten(constant.name, 38), f"{dtype} {shape_text(shape)}"


def _number(value: Any) -> str:  # noqa: ANN401
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def attribute_lines(node: gs.Node, width: int = 30, most: int = 3) -> list[str]:
    """The attributes that matter, a few to a line."""
    parts = [
        f"{_TITLES.get(key, key)} {_attribute_text(key, node.attrs[key])}"
        for key in _ATTRIBUTES
        if key in node.attrs and not _goes_without_saying(key, node.attrs[key])
    ]
    lines: list[str] = []
    for part in parts:
        part = shorten(part, width)
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return lines[:most]


def _goes_without_saying(key: str, value: Any) -> bool:  # noqa: ANN401
    if key in ("strides", "dilations"):
        return all(step == 1 for step in _listed(value))
    if key == "pads":
        return not any(_listed(value))
    return isinstance(value, (int, float, str)) and value == _PLAIN.get(key)


def _listed(value: Any) -> Any:  # noqa: ANN401
    """A list as it is; of anything else, which does not belong there, a list."""
    return value if isinstance(value, (list, tuple)) else [value]


def _attribute_text(key: str, value: Any) -> str:  # noqa: ANN401
    if key == "to":
        return _DTYPE_CODES.get(value, str(value)) if isinstance(value, int) else str(value)
    if key == "kernel_shape":
        return "×".join(map(str, _listed(value)))
    if isinstance(value, (list, tuple)):
        return " ".join(map(_number, value))
    return _number(value)
