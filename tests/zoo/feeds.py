"""Random inputs for a model of the zoo, and one way to run it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tests.zoo.registry import Entry, entries

Feeds = dict[str, NDArray[Any]]
DIMS = {"N": 2, "batch": 2, "T": 5, "seq": 5, "sequence": 5}


class RampUp(OpRun):
    """Multiply column j by 1 + j: a custom operator for which the order of units matters."""

    op_domain = "zoo.custom"

    def _run(self, x: NDArray[Any]) -> tuple[NDArray[Any]]:
        return (x * (1 + np.arange(x.shape[-1])).astype(x.dtype),)


def feeds(name: str, model: onnx.ModelProto, seed: int = 0, dims: Mapping[str, int] | None = None) -> Feeds:
    """Random inputs: normal floats, integers below the entry's bound (2 by default), fair booleans.

    `dims` overrides the sizes of symbolic dimensions. Initializers that are also graph inputs are left out.
    """
    entry = entries()[name]
    sizes = {**DIMS, **entry.dims, **(dims or {})}
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    given = {tensor.name for tensor in model.graph.initializer}
    return {value.name: _draw(value, sizes, entry, rng) for value in model.graph.input if value.name not in given}


def _draw(value: onnx.ValueInfoProto, sizes: Mapping[str, int], entry: Entry, rng: np.random.Generator) -> NDArray[Any]:
    kind = value.type.tensor_type
    shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in kind.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if kind.elem_type == TensorProto.BOOL:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        return rng.integers(0, entry.ranges.get(value.name, 2), shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def run(model: onnx.ModelProto, inputs: Feeds, *, reference: bool = False) -> list[NDArray[Any]]:
    """Outputs of the model in onnxruntime (CPU), or in ONNX's reference evaluator."""
    return runs(model, [inputs], reference=reference)[0]


def runs(
    model: onnx.ModelProto | bytes, batches: Sequence[Feeds], *, reference: bool = False
) -> list[list[NDArray[Any]]]:
    """`run` for each of several inputs, with one session; onnxruntime takes a serialized model too."""
    if reference:
        evaluator = ReferenceEvaluator(model, new_ops=[RampUp])
        return [[np.asarray(value) for value in evaluator.run(None, inputs)] for inputs in batches]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Kernels for 8-bit integers saturate on processors without VNNI, where results depend on the order of the summands.
    options.add_session_config_entry("session.x64quantprecision", "1")
    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [[np.asarray(value) for value in session.run(None, inputs)] for inputs in batches]
