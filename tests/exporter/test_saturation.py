"""Which written graphs ONNX Runtime must keep from saturating."""

import onnx
import pytest

from mvlm_export.exporter.saturation import may_saturate

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[2,3,4,4] x) => (float[2,3,4,4] y)
  <float s = {0.1}, uint8 z = {128}, int8 w, float t, float[3,3,1,1] k> {
  q = QuantizeLinear(x, s, z)
  BODY
}
"""
SAFE = "y = com.microsoft.MatMulIntegerToFloat(q, w, s, t, z)"
CONVOLUTION = "d = DequantizeLinear(q, s, z)\n  c = Conv(d, k)\n  "
PRODUCT = "d = DequantizeLinear(q, s, z)\n  e = DequantizeLinear(w, t)\n  y = MatMul(d, e)"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SAFE, False),
        (PRODUCT, True),
        (f"{PRODUCT}\n  o = com.microsoft.MatMulIntegerToFloat(q, w, s, t, z)", True),
        (f"{CONVOLUTION}y = Reshape(c, k)", False),
        (f"{CONVOLUTION}y = QuantizeLinear(c, s, z)", True),
        (f"{CONVOLUTION}r = Relu(c)\n  y = QuantizeLinear(r, s, z)", True),
        ("y = MatMulInteger(q, w)", True),
    ],
    ids=["narrow", "as written", "both", "float conv", "integer conv", "relu", "other"],
)
def test_what_reads_quantized_activations_counts(body, expected):
    graph = onnx.parser.parse_model(TEXT.replace("BODY", body)).graph
    assert may_saturate(graph) is expected


def test_a_float_graph_cannot():
    text = TEXT.replace("q = QuantizeLinear(x, s, z)\n  BODY", "y = Relu(x)")
    assert not may_saturate(onnx.parser.parse_model(text).graph)
