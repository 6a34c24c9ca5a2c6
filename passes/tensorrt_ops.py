"""What each TensorRT's ONNX parser reads: operators, and the limits that parsing finds.

Facts, as data, from the public repository onnx/onnx-tensorrt (Apache-2.0):

- 10.3: the operators with an importer in ``onnxOpImporters.cpp`` of branch 10.1-GA, less those
  outside the ONNX standard (``TRT_*``, ``ImageScaler``, ...). ``docs/Changelog.md`` adds none
  in 10.2 and 10.3. The limits are the "Restrictions" column of ``docs/operators.md``.
- 10.16: the same, plus what the changelog and ``docs/operators.md`` of 10.4 to 10.15 add.
- TensorRT-RTX 1.7: found by parsing with it on the CPU (``Swish``; ``NonZero`` has no plugin).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

InputNames = Mapping[int, str]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPS_10_3 = _words(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh
    CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand
    EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool
    GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid
    HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization
    LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool
    Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or
    PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round Scan Scatter ScatterElements ScatterND Selu Shape Shrink
    Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze
    Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """
)
# Changelog: windows 10.4, STFT 10.5, Attention 10.14, the other three 10.15.
_OPS_10_16 = _OPS_10_3 | _words(
    """
    Attention BlackmanWindow HammingWindow HannWindow RMSNormalization RotaryEmbedding STFT
    TensorScatter
    """
)
_OPS_RTX_1_7 = (_OPS_10_16 | {"Swish"}) - {"NonZero"}

_REDUCTIONS: dict[str, InputNames] = {
    op: {1: "axes"} for op in _OPS_10_3 if op.startswith("Reduce")
}
# "must be an initializer" or "build-time constant" in operators.md.
_CONSTANTS_10_16: dict[str, InputNames] = {
    **_REDUCTIONS,
    "OneHot": {1: "depth"},
    "Dropout": {2: "training_mode"},
}
_CONSTANTS_10_3: dict[str, InputNames] = {
    **_CONSTANTS_10_16,
    "CumSum": {1: "axis"},  # dynamic since 10.8
    "Pad": {3: "axes"},  # since 10.4
    "Squeeze": {1: "axes"},  # since 10.7
    "Unsqueeze": {1: "axes"},  # since 10.7
}


@dataclass(frozen=True)
class OpSet:
    """What one parser reads.

    Attributes:
        title: the parser, for messages.
        ops: standard operators with an importer.
        constant_inputs: inputs that must be initializers or Constant nodes, by operator.
        absent_inputs: inputs that must not be given.
        absent_attributes: attributes that must be absent or 0, with the reason.
        single_output: operators whose first output alone may be used.
    """

    title: str
    ops: frozenset[str]
    constant_inputs: Mapping[str, InputNames]
    absent_inputs: Mapping[str, InputNames] = field(default_factory=dict)
    absent_attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    single_output: frozenset[str] = frozenset({"LayerNormalization", "MaxPool"})


_ATTENTION_INPUTS = {"Attention": {4: "past_key", 5: "past_value", 6: "nonpad_kv_seqlen"}}
_ATTENTION_ATTRIBUTES = {
    "Attention": {
        "is_causal": "its causal mask is aligned to the first key, wrong with a past",
        "softcap": "it has no soft cap",
    }
}
_SINGLE_OUTPUT = frozenset({"LayerNormalization", "MaxPool", "Attention"})

OP_SETS: dict[str, OpSet] = {
    "tensorrt_10_3": OpSet("TensorRT 10.3", _OPS_10_3, _CONSTANTS_10_3),
    "tensorrt_10_16": OpSet(
        "TensorRT 10.16",
        _OPS_10_16,
        _CONSTANTS_10_16,
        _ATTENTION_INPUTS,
        _ATTENTION_ATTRIBUTES,
        _SINGLE_OUTPUT,
    ),
    "tensorrt_rtx_1_7": OpSet(
        "TensorRT-RTX 1.7",
        _OPS_RTX_1_7,
        _CONSTANTS_10_16,
        _ATTENTION_INPUTS,
        _ATTENTION_ATTRIBUTES,
        _SINGLE_OUTPUT,
    ),
}

# What to write instead, where there is one answer.
REPLACEMENTS: dict[str, str] = {
    "Attention": "write it as MatMul, Softmax and MatMul, which TensorRT fuses to one kernel",
    "RMSNormalization": "write it as Pow, ReduceMean, Add, Sqrt, Div and Mul in FP32",
    "RotaryEmbedding": "write it as Mul, Slice, Neg, Concat and Add",
    "TensorScatter": "use the append form of the cache: past in, new rows out",
    "Swish": "write it as Sigmoid and Mul",
    "DynamicQuantizeLinear": "quantize with constant scales (QuantizeLinear)",
    "MatMulInteger": "use QuantizeLinear and DequantizeLinear around MatMul",
    "QLinearMatMul": "use QuantizeLinear and DequantizeLinear around MatMul",
    "QLinearConv": "use QuantizeLinear and DequantizeLinear around Conv",
    "ConvInteger": "use QuantizeLinear and DequantizeLinear around Conv",
    "BitwiseAnd": "use And on BOOL tensors",
    "BitwiseOr": "use Or on BOOL tensors",
    "BitwiseNot": "use Not on BOOL tensors",
}
