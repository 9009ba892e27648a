"""Which widths the convolutions of onnxruntime like on this machine."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

_SIZE = 16
"""Rows and columns of the image."""
_RUNS = 12
BLOCKS = (8, 16)


@cache
def channel_block() -> int:
    """Return how many channels a convolution computes at once: 8 or 16, measured once in a process, in about 0.1 s.

    onnxruntime lays channels out in blocks of 8 (AVX2) or 16 (AVX-512) and pads the last block, so that 56 channels
    take the time of 64 where blocks are of 16. Where no difference shows, 8.
    """
    middle, low, high = (_seconds(width) for width in (56, 48, 64))
    return BLOCKS[0] if middle < 0.7 * high + 0.3 * low or high <= low else BLOCKS[1]


def _seconds(width: int) -> float:
    """Seconds of two convolutions with ``width`` channels in between, the smallest of some runs on one core."""
    rng = np.random.default_rng(0)
    weights = {"a": (width, 64, 3, 3), "b": (64, width, 3, 3)}
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "b"], ["y"], pads=[1, 1, 1, 1]),
    ]
    shape = [1, 64, _SIZE, _SIZE]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
    best = float("inf")
    for _ in range(_RUNS):
        begin = time.perf_counter()
        session.run(None, feeds)
        best = min(best, time.perf_counter() - begin)
    return best
