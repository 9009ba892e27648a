"""ONNX out: the graph IR as a file or a ModelProto."""
