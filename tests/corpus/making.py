"""Models of the corpus that are made from others by the tools that people use: onnxruntime's optimizer, half
precision, onnx's version converter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.version_converter
import onnxruntime as ort
from onnxruntime.transformers.float16 import convert_float_to_float16


def make(how: str, source: Path) -> bytes:
    """Return the serialized model that a tool makes from a file.

    Raises:
        KeyError: a tool of that name is not known.
    """
    return _TOOLS[how](source)


def _optimized(source: Path) -> bytes:
    """Return what onnxruntime saves: operators fused into those of com.microsoft, still for any processor."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return target.read_bytes()


def _half(source: Path) -> bytes:
    converted: onnx.ModelProto = convert_float_to_float16(onnx.load(source))
    content: bytes = converted.SerializeToString()
    return content


def _opset_21(source: Path) -> bytes:
    content: bytes = onnx.version_converter.convert_version(onnx.load(source), 21).SerializeToString()
    return content


_TOOLS: dict[str, Callable[[Path], bytes]] = {"optimized": _optimized, "float16": _half, "opset 21": _opset_21}
