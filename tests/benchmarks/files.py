"""Large models with external data, written as a stream, in memory-backed storage where there is some."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed afterwards: in /dev/shm where it exists, so that disks are not what is measured."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def feed_forward(folder: Path, megabytes: int, width: int = 4096, activation: str = "Gelu") -> Path:
    """An MLP of square MatMul layers with biases; weights in one external file, drawn one layer at a time."""
    layers = max(2, round(megabytes * 1e6 / (4 * width * width)))
    path = folder / f"{activation.lower()}{megabytes}.onnx"
    rng = np.random.default_rng(0)
    nodes, tensors, offset = [], [], 0
    value = "x"
    with open(f"{path}.data", "wb") as file:
        for k in range(layers):
            for name, shape in ((f"layer{k}.weight", (width, width)), (f"layer{k}.bias", (width,))):
                array = rng.random(shape, dtype=np.float32) - np.float32(0.5)
                array *= np.float32(2.0 / width**0.5)
                file.write(array.data)
                tensor = TensorProto(
                    name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL
                )
                for key, entry in (("location", f"{path.name}.data"), ("offset", offset), ("length", array.nbytes)):
                    tensor.external_data.add(key=key, value=str(entry))
                tensors.append(tensor)
                offset += array.nbytes
            nodes.append(helper.make_node("MatMul", [value, f"layer{k}.weight"], [f"m{k}"], name=f"matmul{k}"))
            nodes.append(helper.make_node("Add", [f"m{k}", f"layer{k}.bias"], [f"a{k}"], name=f"add{k}"))
            value = f"a{k}"
            if k < layers - 1:
                nodes.append(helper.make_node(activation, [value], [f"h{k}"], name=f"act{k}"))
                value = f"h{k}"
    graph = helper.make_graph(
        nodes,
        "feed_forward",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, width])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [2, width])],
        tensors,
        value_info=[helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, [2, width]) for n in nodes],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
