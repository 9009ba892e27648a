"""Inspect a Llama-shaped graph of 7 billion parameters whose weights are holes of a sparse file.

    python tests/benchmarks/llama_inspect.py [--layers 32] [--key-heads 32] [--folder DIR] [--profile]

Writes ``llama.onnx`` and ``llama.onnx.data`` (as long as the weights, but almost nothing on disk), then runs
``cipm inspect --spaces`` on it in a process of its own, and prints wall time, processor time and peak memory.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper


class Llama:
    """Writes the graph: RMSNorm, rotary embedding by a table of frequencies, attention, gated feed-forward."""

    def __init__(self, layers: int, width: int, inner: int, heads: int, key_heads: int, vocabulary: int) -> None:
        self.heads, self.key_heads, self.size = heads, key_heads, width // heads
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.length = 0
        self._graph(layers, width, inner, vocabulary)

    def weight(self, name: str, *dims: int) -> str:
        """Name of a float16 tensor that lies in the data file."""
        tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT16)
        tensor.data_location = TensorProto.EXTERNAL
        length = 2 * int(np.prod(dims))
        for key, value in (("location", "llama.onnx.data"), ("offset", self.length), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.length += -(-length // 4096) * 4096
        self.tensors.append(tensor)
        return name

    def number(self, name: str, value: object, dtype: type = np.int64) -> str:
        """Name of a small constant."""
        if all(t.name != name for t in self.tensors[-64:]):
            self.tensors.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Name of the output of a new node."""
        out = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
        return out

    def norm(self, x: str, name: str, width: int) -> str:
        square = self.node("Pow", self.node("Cast", x, to=TensorProto.FLOAT), self.two)
        mean = self.node("ReduceMean", square, self.last, keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.epsilon))
        scaled = self.node("Div", self.node("Cast", x, to=TensorProto.FLOAT), root)
        return self.node("Mul", self.weight(name, width), self.node("Cast", scaled, to=TensorProto.FLOAT16))

    def rotated(self, x: str) -> str:
        one = self.node("Slice", x, self.zero, self.half, self.last)
        two = self.node("Slice", x, self.half, self.end, self.last)
        turned = self.node("Concat", self.node("Neg", two), one, axis=-1)
        return self.node("Add", self.node("Mul", x, self.cos), self.node("Mul", turned, self.sin))

    def split(self, x: str, heads: str) -> str:
        return self.node("Transpose", self.node("Reshape", x, heads), perm=[0, 2, 1, 3])

    def attention(self, x: str, at: str, width: int) -> str:
        key_width = self.key_heads * self.size
        q = self.node("MatMul", x, self.weight(f"{at}.q_proj.weight", width, width))
        k = self.node("MatMul", x, self.weight(f"{at}.k_proj.weight", width, key_width))
        v = self.node("MatMul", x, self.weight(f"{at}.v_proj.weight", width, key_width))
        q = self.rotated(self.split(q, self.by_head))
        k, v = self.rotated(self.split(k, self.by_key)), self.split(v, self.by_key)
        if self.key_heads != self.heads:
            k, v = (self.node("Reshape", self.node("Expand", self.node("Unsqueeze", y, self.axis2), self.repeated),
                              self.merged) for y in (k, v))  # fmt: skip
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.node("Add", self.node("Mul", scores, self.scale), self.mask)
        mixed = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        merged = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.flat)
        return self.node("MatMul", merged, self.weight(f"{at}.o_proj.weight", width, width))

    def feed_forward(self, x: str, at: str, width: int, inner: int) -> str:
        gate = self.node("MatMul", x, self.weight(f"{at}.gate_proj.weight", width, inner))
        up = self.node("MatMul", x, self.weight(f"{at}.up_proj.weight", width, inner))
        gated = self.node("Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), up)
        return self.node("MatMul", gated, self.weight(f"{at}.down_proj.weight", inner, width))

    def _graph(self, layers: int, width: int, inner: int, vocabulary: int) -> None:
        groups = self.heads // self.key_heads
        self.two, self.epsilon = self.number("two", 2.0, np.float32), self.number("epsilon", 1e-5, np.float32)
        self.last, self.zero = self.number("last", [-1]), self.number("zero", [0])
        self.half = self.number("half", [self.size // 2])
        self.end, self.axis2 = self.number("end", [1 << 31]), self.number("axis2", [2])
        self.by_head = self.number("by_head", [0, 0, self.heads, self.size])
        self.by_key = self.number("by_key", [0, 0, self.key_heads, self.size])
        self.flat, self.scale = self.number("flat", [0, 0, width]), self.number("scale", self.size**-0.5, np.float16)
        frequencies = 1e4 ** (-np.arange(0, self.size, 2) / self.size)
        shape = self.node("Shape", "input_ids")
        batch, length = (self.node("Gather", shape, self.number(f"at{k}", [k])) for k in (0, 1))
        self.repeated = self.node(
            "Concat", batch, self.number("key_heads", [self.key_heads]), self.number("groups", [groups]), length,
            self.number("size", [self.size]), axis=0,
        )  # fmt: skip
        self.merged = self.node("Concat", batch, self.number("heads", [self.heads]), length, "size", axis=0)
        positions = self.node("Cast", self.node("Unsqueeze", "position_ids", self.last), to=TensorProto.FLOAT)
        angles = self.node("Mul", positions, self.number("inverse_frequencies", frequencies, np.float32))
        angles = self.node("Unsqueeze", self.node("Concat", angles, angles, axis=-1), self.number("axis1", [1]))
        self.cos, self.sin = (self.node("Cast", self.node(op, angles), to=TensorProto.FLOAT16) for op in ("Cos", "Sin"))
        kept = self.node("Unsqueeze", "attention_mask", self.number("axes12", [1, 2]))
        hidden = self.node("Cast", self.node("Sub", kept, self.number("one", 1)), to=TensorProto.FLOAT16)
        self.mask = self.node("Mul", hidden, self.number("far", 6e4, np.float16))
        x = self.node("Gather", self.weight("embed_tokens.weight", vocabulary, width), "input_ids")
        for layer in range(layers):
            at = f"layers.{layer}"
            x = self.node("Add", x, self.attention(self.norm(x, f"{at}.input_layernorm.weight", width), at, width))
            normed = self.norm(x, f"{at}.post_attention_layernorm.weight", width)
            x = self.node("Add", x, self.feed_forward(normed, at, width, inner))
        x = self.norm(x, "norm.weight", width)
        self.nodes.append(helper.make_node("MatMul", [x, self.weight("lm_head.weight", width, vocabulary)], ["logits"]))

    def save(self, folder: Path) -> Path:
        """Write the graph, and a sparse file of zeros for the weights; returns the path of the graph."""
        ids = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask", "position_ids")
        ]
        out = helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "length", "vocabulary"])
        graph = helper.make_graph(self.nodes, "llama", ids, [out], self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        path = folder / "llama.onnx"
        path.write_bytes(model.SerializeToString())
        with open(folder / "llama.onnx.data", "wb") as data:
            data.truncate(self.length)
        return path


def measure(path: Path) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and peak memory in GB of ``cipm inspect --spaces``."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "cipm_ir", "inspect", "--spaces", os.fspath(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used, after.ru_maxrss / 1e6


def main() -> None:
    """Measure, or profile in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        net = Llama(given.layers, given.width, given.inner, given.heads, given.key_heads, given.vocabulary)
        path = net.save(folder)
        print(f"{net.length / 2e9:.2f} billion parameters, {len(net.nodes)} nodes, {path}")
        if given.profile:
            import cProfile
            import pstats

            from cipm_ir.cli import main as cipm

            with cProfile.Profile() as profile:
                cipm(["inspect", "--spaces", os.fspath(path)])
            pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
            return
        wall, used, peak = measure(path)
        print(f"inspect: {wall:.2f} s wall, {used:.2f} s of processor time, {peak:.2f} GB at most")


if __name__ == "__main__":
    main()
