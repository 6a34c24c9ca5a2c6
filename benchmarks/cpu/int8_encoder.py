"""ONNX Runtime's dynamic INT8 of a bundle's float vision encoder and projector.

``python int8_encoder.py BUNDLE FOLDER``. Products by weights become 8-bit; convolutions stay
in float, as dynamic 8-bit convolutions are slower than those.
"""

from __future__ import annotations

import sys
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from mvlm_export.engines.bundle import Bundle


def main() -> None:
    """Quantize both graphs."""
    bundle, folder = Bundle.load(sys.argv[1], verify=False), Path(sys.argv[2])
    for name in ("vision_encoder", "projector"):
        quantize_dynamic(
            bundle.graph_path(name),
            folder / f"{name}.onnx",
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=False,
        )


if __name__ == "__main__":
    main()
