"""The scale symmetries of a graph, found by numbers alone: the log-scales of single entries that no output feels.

Every entry of every parameter gets a log-scale of its own, entry' = entry * e^s. The Jacobian J of the outputs by all s
is taken at several random settings of the parameters and stacked. A vector in its null space changes nothing at any of
them, to first order and hence (the scalings commute) altogether: it is a scale symmetry. Nothing here knows of axes,
units or rules. Ours is compared with it as a space: the same dimension, and every direction of ours lies in it.

A variance v with epsilon is scaled as v + epsilon, which is how `act` scales it, or as v itself (``plain_variance``),
which leaves only what needs no change of a variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from cipm_ir.algebra import Element
from cipm_ir.symmetry.program import Program

Floats = NDArray[np.float64]
Arrays = dict[str, Floats]
STEP = 1e-5
SMALL, LARGE = 1e-9, 1e-8
"""Singular values, over the largest, below which a direction counts as null and above which it does not."""
_STATE = ort.capi.onnxruntime_pybind11_state
_REFUSALS = (_STATE.NotImplemented, _STATE.InvalidGraph, _STATE.Fail, _STATE.InvalidArgument, _STATE.RuntimeException)


class Conv(OpRun):
    """Two-dimensional convolution by sums over windows: that of the reference evaluator takes milliseconds."""

    op_domain = ""

    def _run(self, x: Floats, w: Floats, b: Floats | None = None, **given: Any) -> tuple[Floats]:
        group, pads, strides = given.get("group") or 1, given.get("pads"), given.get("strides")
        top, left, bottom, right = pads or [0, 0, 0, 0]
        down, across = strides or [1, 1]
        padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(2, 3))[:, :, ::down, ::across]
        n, c, height, width = windows.shape[:4]
        windows = windows.reshape(n, group, c // group, height, width, *w.shape[2:])
        filters = w.reshape(group, -1, *w.shape[1:])
        out = np.einsum("ngchwij,gocij->ngohw", windows, filters, optimize=True).reshape(n, -1, height, width)
        return (np.asarray(out if b is None else out + b[:, None, None]),)


class AveragePool(OpRun):
    """Averages over windows without padding."""

    op_domain = ""

    def _run(self, x: Floats, kernel_shape: list[int], strides: list[int], **_given: Any) -> tuple[Floats]:
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel_shape, axis=(2, 3))
        return (np.asarray(windows[:, :, :: strides[0], :: strides[1]].mean(axis=(-2, -1))),)


@dataclass
class Twin:
    """A model with its floating-point parameters (of more than one entry) as inputs.

    ``offset``: the epsilon by which a variance is shifted before it is scaled.
    """

    run: Callable[[Arrays], Floats]
    parameters: Arrays
    offset: dict[str, float]

    def log(self, name: str, array: Floats) -> Floats:
        """Log of the magnitudes of a parameter's entries, as far as these can be scaled."""
        return np.asarray(np.log(np.abs(array + self.offset.get(name, 0.0))).ravel())

    def scaled(self, name: str, array: Floats, entry: int, log_scale: float) -> Floats:
        """The array with one entry scaled."""
        out, shift = array.copy(), self.offset.get(name, 0.0)
        out.flat[entry] = (out.flat[entry] + shift) * np.exp(log_scale) - shift
        return out


def twin(model: onnx.ModelProto, samples: int = 16, *, plain_variance: bool = False, seed: int = 0) -> Twin:
    """The twin of a float64 model, run on random inputs, by onnxruntime where it has the kernels."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    free = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer if _is_parameter(t)}
    kept = [t for t in copy.graph.initializer if t.name not in free]
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in copy.graph.input:
        shape = [dim.dim_value or (5 if dim.dim_param == "T" else samples) for dim in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.standard_normal(shape)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    copy.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.DOUBLE, a.shape) for n, a in free.items())
    offset = {}
    for node in copy.graph.node:
        if node.op_type == "BatchNormalization" and not plain_variance:
            given = {a.name: a.f for a in node.attribute}
            offset[node.input[4]] = float(np.float32(given.get("epsilon", 1e-5)))
    run = _runner(copy, {**feeds, **free})

    def outputs(parameters: Arrays) -> Floats:
        return np.concatenate([np.asarray(y, np.float64).ravel() for y in run({**feeds, **parameters})])

    return Twin(outputs, free, offset)


def _is_parameter(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == TensorProto.DOUBLE and int(np.prod(tensor.dims)) > 1


def _runner(model: onnx.ModelProto, feeds: Arrays) -> Callable[[Arrays], list[Any]]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        return lambda given: list(session.run(None, given))
    except _REFUSALS:
        reference = ReferenceEvaluator(model, new_ops=[Conv, AveragePool])
        return lambda given: list(reference.run(None, given))


def jacobian(one: Twin, parameters: Arrays) -> Floats:
    """(outputs, entries): derivatives by the log-scale of each entry, by central differences."""
    columns = []
    for name, array in parameters.items():
        for entry in range(array.size):
            ends = [one.run({**parameters, name: one.scaled(name, array, entry, h)}) for h in (STEP, -STEP)]
            columns.append((ends[0] - ends[1]) / (2 * STEP))
    return np.stack(columns, axis=1)


def stacked(one: Twin, settings: int = 12, seed: int = 1) -> Floats:
    """Jacobians at random settings of the parameters, each scaled to a largest entry of 1.

    Signs are drawn anew, too, but for tensors that are all positive: a unit that a Relu shuts at one setting, and that
    any scale would do for, opens at another. There are many settings with few inputs each, because constants meet in
    the last bias: at one setting a change of one can make up for a change of another, not at all of them.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(settings):
        drawn = {}
        for name, array in one.parameters.items():
            signs = rng.choice([-1.0, 1.0], array.shape) if (array < 0).any() else 1.0
            drawn[name] = np.abs(array) * np.exp(0.5 * rng.standard_normal(array.shape)) * signs
        part = jacobian(one, drawn)
        parts.append(part / max(np.abs(part).max(), 1e-300))
    return np.concatenate(parts)


def null_dimension(stack: Floats) -> int:
    """Dimension of the null space; fails where a singular value is neither clearly zero nor clearly not."""
    assert stack.shape[0] >= stack.shape[1], "too few outputs for so many entries: take more samples"
    values = np.linalg.svd(stack, compute_uv=False)
    values = values / values[0]
    between = values[(values > SMALL) & (values < LARGE)]
    assert not len(between), f"singular values in the gap: {between}"
    return int((values <= SMALL).sum())


def our_directions(model: onnx.ModelProto, one: Twin, *, exact_only: bool = False) -> Floats:
    """(directions, entries): the change of every entry's log when one unit of one space is scaled by e, one by one.

    ``exact_only``: without the directions that powers of two would not leave bit for bit.
    """
    program = Program.of(ir.from_proto(model))
    rows = []
    for space in program.spaces:
        for d in range(space.group.scales):
            for unit in range(space.size if space.exact[d] or not exact_only else 0):
                scale = np.ones((space.group.scales, space.size))
                scale[d, unit] = np.e
                element = Element(np.arange(space.size), scale, space.identity().sign)
                moved = ir.to_proto(program.act({space: element}).emit())
                after = {t.name: numpy_helper.to_array(t) for t in moved.graph.initializer}
                before = {n: one.log(n, a) for n, a in one.parameters.items()}
                rows.append(np.concatenate([one.log(n, after[n]) - before[n] for n in one.parameters]))
    entries = sum(a.size for a in one.parameters.values())
    return np.stack(rows) if rows else np.zeros((0, entries))


@dataclass(frozen=True)
class Comparison:
    """Scale directions of one model.

    ours: what the spaces say: over spaces, directions times units. independent: the rank of these. numeric: the
    dimension of the null space. leak: by how much the worst of ours changes an output, relative to the Jacobian.
    """

    ours: int
    independent: int
    numeric: int
    leak: float


def compare(model: onnx.ModelProto, samples: int = 16, *, plain_variance: bool = False) -> Comparison:
    """Count the directions of a float64 model both ways."""
    one = twin(model, samples, plain_variance=plain_variance)
    stack = stacked(one)
    ours = our_directions(model, one, exact_only=plain_variance)
    rank = int(np.linalg.matrix_rank(ours)) if len(ours) else 0
    leak = float(np.abs(stack @ ours.T).max(initial=0.0))
    return Comparison(len(ours), rank, null_dimension(stack), leak)
