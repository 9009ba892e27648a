"""Lowering of torch operations to ONNX nodes, one entry per operation, by family."""
