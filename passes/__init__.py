"""Graph surgery and graph checks: ONNX in, ONNX out."""
