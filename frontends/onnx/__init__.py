"""ONNX in: files and objects of ONNX become the graph IR."""
