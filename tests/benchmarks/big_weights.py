"""Peak memory and time of every exact pass on a model of a given size whose weights lie in a data file.

    python -m tests.benchmarks.big_weights MEGABYTES [--passes NAME,...] [--verify] [--folder DIR]

The model is a mixture of convolutions with batch norms, dense layers and two transformers, one with LayerNormalization
and one with RMSNormalization, with something to do for every pass: duplicate and dead units, constant factors, large
biases. Each pass runs in a process of its own, in which `optimize` reads the file and writes the result. One more
process loads and saves the model with onnx_ir alone, `plain`, which all times are compared with.

Memory is what is anonymous (RssAnon of /proc/PID/status, sampled by the parent every 5 ms), that is, all but the pages
of mapped files, above what the process held once its libraries were imported; in multiples of the bytes of the weights.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

CHILD = """
import sys
import numpy, scipy.optimize, scipy.sparse.linalg, onnx_ir, onnxruntime
import cipm_ir
from cipm_ir.passes.framework import registry
registry.listing()
name, source, target, verify = sys.argv[1:]
sys.stdin.readline() if print("ready", flush=True) is None else None
if name == "plain":
    onnx_ir.save(onnx_ir.load(source), target, external_data=target.rpartition("/")[2] + ".data")
elif name == "fingerprint":
    print(cipm_ir.fingerprint(source))
else:
    made = cipm_ir.optimize(source, [name], output=target, verify=verify == "yes")
    print(made.report.steps[0].summary)
"""
FOURTHS = ("conv", "dense", "layer_norm", "rms_norm")
PASSES = (
    "fingerprint", "clean-up", "canonicalize", "canonicalize-signs", "equalize", "cluster", "expose", "fold",
    "fold-affine", "fold-batch-norm", "remove-dead", "rotate", "absorb-bias",
)  # fmt: skip


@dataclass
class Mixture:
    """Writes a model whose weights go to a file one at a time."""

    path: Path
    width: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    offset: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.file = open(f"{self.path}.data", "wb")  # noqa: SIM115

    def weight(self, name: str, *shape: int, changed: bool = False) -> str:
        """A random weight of rows of norm about 1; with ``changed``, units 0 and 1 are equal and nothing reads 2."""
        array = self.rng.random(shape, dtype=np.float32)
        array -= np.float32(0.5)
        array *= np.float32(3.0 / math.prod(shape[1:] if len(shape) == 4 else shape[:1]) ** 0.5)
        if len(shape) == 2:  # units of unlike size
            array *= np.exp2(2 * self.rng.random(shape[1], dtype=np.float32) - 1)
        if changed:
            array[:, 1] = array[:, 0]
            array[2] = 0
        return self.tensor(name, array)

    def tensor(self, name: str, array: np.ndarray) -> str:
        """Store an array in the data file."""
        self.file.write(array.data)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        length = array.nbytes
        entries = (("location", f"{self.path.name}.data"), ("offset", self.offset), ("length", length))
        for key, entry in entries:
            tensor.external_data.add(key=key, value=str(entry))
        self.offset += length
        self.tensors.append(tensor)
        return name

    def vector(self, name: str, size: int, value: float | None = None) -> str:
        """A small random vector, or a constant one."""
        random = self.rng.random(size, dtype=np.float32) + np.float32(0.5)
        return self.tensor(name, random if value is None else np.full(size, value, np.float32))

    def ints(self, name: str, *values: int) -> str:
        """A small list of numbers."""
        self.tensors.append(onnx.numpy_helper.from_array(np.asarray(values, np.int64), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Name of the output of a new node."""
        out = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"n{len(self.nodes)}", **attributes))
        return out

    def conv(self, x: str, until: int) -> str:
        """3 x 3 convolutions with batch norms and Relu."""
        channels = self.width // 2
        k = 0
        while self.offset < until or k < 2:
            x = self.node("Conv", x, self.weight(f"conv{k}.weight", channels, channels, 3, 3), pads=[1, 1, 1, 1])
            norm = [self.vector(f"conv{k}.{part}", channels) for part in ("scale", "shift", "mean", "variance")]
            x = self.node("Relu", self.node("BatchNormalization", x, *norm))
            k += 1
        x = self.node("ReduceMean", x, self.ints("last", 2, 3), keepdims=0)
        return self.node("MatMul", x, self.weight("pooled.weight", channels, self.width))

    def dense(self, x: str, until: int) -> str:
        """Square layers with Relu, Gelu and Tanh in turn, constant factors, and large biases; all of it bounded."""
        x = self.node("Sigmoid", x)
        k = 0
        while self.offset < until or k < 4:
            x = self.node("MatMul", x, self.weight(f"dense{k}.weight", self.width, self.width, changed=True))
            if k % 4 == 3:
                x = self.node("Mul", x, self.vector(f"dense{k}.factor", self.width))
            bias = self.vector(f"dense{k}.bias", self.width, 0.25)
            x = self.node("Add", x, bias)
            x = self.node(("Relu", "Gelu", "Tanh")[k % 3], x)
            k += 1
        return x

    def transformer(self, x: str, until: int, norm: str) -> str:
        """Pre-norm blocks with four heads and a feed-forward part of four times the width."""
        n, heads, k = self.width, 4, 0
        x = self.node("MatMul", x, self.weight(f"{norm}.in", n, n))
        split, merged = self.ints(f"{norm}.split", 1, 4, heads, -1), self.ints(f"{norm}.merged", 1, 4, n)

        def normed(x: str, name: str) -> str:
            if norm == "layer_norm":
                return self.node("LayerNormalization", x, self.vector(f"{name}.g", n), self.vector(f"{name}.b", n))
            return self.node("RMSNormalization", x, self.vector(f"{name}.g", n, 1.0))

        def head(y: str, name: str, perm: list[int]) -> str:
            made = self.node("MatMul", y, self.weight(name, n, n))
            return self.node("Transpose", self.node("Reshape", made, split), perm=perm)

        while self.offset < until or k < 1:
            at = f"{norm}{k}"
            y = normed(x, f"{at}.one")
            q, v = head(y, f"{at}.q", [0, 2, 1, 3]), head(y, f"{at}.v", [0, 2, 1, 3])
            scores = self.node("MatMul", q, head(y, f"{at}.k", [0, 2, 3, 1]))
            mixed = self.node("MatMul", self.node("Softmax", scores), v)
            mixed = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), merged)
            x = self.node("Add", x, self.node("MatMul", mixed, self.weight(f"{at}.o", n, n)))
            y = self.node("MatMul", normed(x, f"{at}.two"), self.weight(f"{at}.up", n, 4 * n))
            y = self.node("Gelu", self.node("Add", y, self.vector(f"{at}.bias", 4 * n, 0.1)))
            x = self.node("Add", x, self.node("MatMul", y, self.weight(f"{at}.down", 4 * n, n)))
            k += 1
        return self.node("MatMul", normed(x, f"{norm}.end"), self.weight(f"{norm}.out", n, n))

    def finish(self, x: str) -> None:
        """Write the model file."""
        self.file.close()
        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [x], ["y"], name="end")],
            "mixture",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, self.width // 2, 4, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.tensors,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), self.path)


def mixture(folder: Path, megabytes: int, width: int | None = None) -> Path:
    """A model with about so many megabytes of weights, in ``folder``; at least one of each kind of layer."""
    width = width or (256 if megabytes < 100 else 1024 if megabytes < 2000 else 2048)
    made = Mixture(folder / f"mixture{megabytes}.onnx", width)
    size = megabytes * 10**6
    x = made.dense(made.conv("x", size // 5), 2 * size // 5)
    x = made.node("Reshape", x, made.ints("tokens", 1, 4, made.width))
    x = made.transformer(x, 3 * size // 4, "layer_norm")
    made.finish(made.transformer(x, size, "rms_norm"))
    return made.path


@dataclass(frozen=True)
class Cost:
    """What one process took: bytes of anonymous memory, seconds of clock and processor, and what it printed."""

    peak: int
    wall: float
    cpu: float
    said: str


def _anonymous(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)
    except OSError:
        return 0


def _cpu(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(name: str, source: Path, target: Path, verify: bool) -> Cost:
    """Run one pass in a process of its own."""
    command = [sys.executable, "-c", CHILD, name, str(source), str(target), "yes" if verify else "no"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        base, busy, start, peak, cpu = _anonymous(child.pid), _cpu(child.pid), time.perf_counter(), 0, 0.0
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak, cpu = max(peak, _anonymous(child.pid)), max(cpu, _cpu(child.pid))
            time.sleep(0.005)
        wall, said = time.perf_counter() - start, child.stdout.read().strip()
    for path in (target, Path(f"{target}.data")):
        path.unlink(missing_ok=True)
    return Cost(max(peak - base, 0), wall, cpu - busy, said if not child.returncode else f"FAILED {child.returncode}")


def main() -> None:
    """Print a line per pass."""
    parser = argparse.ArgumentParser()
    parser.add_argument("megabytes", type=int)
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--verify", action="store_true", help="with the runs that compare the models")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = mixture(Path(folder), given.megabytes)
        size = Path(f"{path}.data").stat().st_size
        print(f"{size / 1e6:.0f} MB of weights; memory in multiples of it, times beside plain load and save")
        plain = measure("plain", path, Path(folder, "out.onnx"), False)
        print(f"{'plain':20} {plain.peak / size:6.2f} x {plain.wall:7.2f} s wall {plain.cpu:7.2f} s CPU", flush=True)
        for name in given.passes.split(","):
            cost = measure(name, path, Path(folder, "out.onnx"), given.verify)
            print(
                f"{name:20} {cost.peak / size:6.2f} x {cost.wall:7.2f} s wall {cost.cpu:7.2f} s CPU "
                f"({cost.wall / plain.wall:5.2f} {cost.cpu / plain.cpu:5.2f})  {cost.said[:120]}",
                flush=True,
            )


if __name__ == "__main__":
    main()
