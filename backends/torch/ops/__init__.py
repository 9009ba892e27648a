"""ONNX operators as torch calls, one entry per operator, by family."""
