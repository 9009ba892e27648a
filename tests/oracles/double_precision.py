"""What a model computes in double precision, and how far an edit moves that against the model's own rounding.

Independent of the verification that it judges: ONNX's reference evaluator on a copy whose floats are all doubles,
beside a run in single precision. An edit that moves no output is equivalent; one that moves every channel of every
output by less than the rounding there cannot be seen from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tests.oracles.double_operators import OPERATORS

from cipm_ir.runtime.inputs.generate import random_inputs, true_inputs
from cipm_ir.runtime.inputs.index_inputs import table_size

Array: TypeAlias = npt.NDArray[Any]
Feeds: TypeAlias = dict[str, Array]
Outputs: TypeAlias = dict[str, Array]

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_WIDENED = {"to", "dtype", "output_dtype"}
_SIZES = ((2, 8, None), (1, 8, None), (2, 32, None), (1, 64, None), (1, 224, None), (1, 1, None), (1, 16, 2), (3, 3, 2))
_PIECES = 8
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
EQUIVALENT = 1e-11
"""Moves up to this share of a channel's largest value are rounding of the double-precision runs."""

BELOW, NEAR = 2.0, 16.0
"""Moves up to these multiples of the rounding in single precision are below it (for two runs are compared) or near it.

What lies near cannot be told from the rounding of a right copy without a risk of false alarms.
"""


class NoDoubleError(RuntimeError):
    """A model cannot be run in double precision; the message says why."""


# --- the double-precision model -------------------------------------------------------------------


def as_double(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every float tensor, type and conversion is a double; it need not pass the checker."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    _widen_graph(copy.graph)
    for function in copy.functions:
        for node in function.node:
            _widen_node(node)
    return copy


def _widen_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    del graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in _FLOATS:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: onnx.NodeProto) -> None:
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", helper.make_tensor("v", TensorProto.DOUBLE, [1], [0.0])))
    for attribute in node.attribute:
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            array = np.asarray(helper.get_attribute_value(attribute), np.float32).astype(np.float64)
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(array)))
        elif attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        elif attribute.type == onnx.AttributeProto.GRAPH:
            _widen_graph(attribute.g)
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                _widen_graph(graph)
        elif attribute.name in _WIDENED and attribute.i in _FLOATS:
            attribute.i = TensorProto.DOUBLE


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


# --- runs -----------------------------------------------------------------------------------------


class Double:
    """A model ready to run in double precision."""

    def __init__(self, model: ir.Model) -> None:
        proto = ir.to_proto(model)
        self._names = [value.name for value in proto.graph.output]
        try:
            self._evaluator = ReferenceEvaluator(as_double(proto), new_ops=list(OPERATORS))
        except Exception as error:
            raise NoDoubleError(f"{type(error).__name__}: {error}") from error

    def run(self, feeds: Mapping[str, Array]) -> Outputs:
        """Run once; float inputs are converted."""
        wide = {
            k: v.astype(np.float64) if v.dtype.name.startswith(("float", "bfloat")) else v for k, v in feeds.items()
        }
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run(None, wide)
        except Exception as error:
            raise NoDoubleError(f"{type(error).__name__}: {error}") from error
        return dict(zip(self._names, map(np.asarray, values), strict=True))


class Single:
    """A model ready to run as it is: in onnxruntime with its optimizations off, else in the reference evaluator."""

    def __init__(self, model: ir.Model, *, optimized: bool = False) -> None:
        proto = ir.to_proto(model)
        self._names = [value.name for value in proto.graph.output]
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", "1")
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        self._session: ort.InferenceSession | ReferenceEvaluator
        try:
            self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not any(word in str(error).lower() for word in ("implement", "registered", "op registered")):
                raise
            self._session = ReferenceEvaluator(proto, new_ops=[op for op in OPERATORS if op.op_domain])

    def run(self, feeds: Mapping[str, Array]) -> Outputs:
        """Run once."""
        return dict(zip(self._names, map(np.asarray, self._session.run(None, dict(feeds))), strict=True))


def probes(model: ir.Model, seed: int = 0, runner: Single | None = None) -> list[tuple[str, Feeds]]:
    """Return inputs on which an edit may show, each with its name: random ones of several sizes, zeros, ones, waves.

    Args:
        model: to be fed; axes of unknown size get the first sizes with which it runs.
        seed: of the random ones.
        runner: of the model, where there is one already.
    """
    runner = runner or Single(model)
    rng = np.random.default_rng([seed, 977])
    failed: Exception | None = None
    for batch, free, limit in _SIZES:
        try:
            first = random_inputs(model, rng, batch, free_size=free, index_limit=limit)
            runner.run(first)
        except Exception as error:
            failed = failed or error
            continue
        draws = [random_inputs(model, rng, batch, free_size=free, index_limit=limit) for _ in range(9)]
        made = [("normal", first), *(("normal", draw) for draw in draws[:4])]
        made += [(f"normal x {size:g}", _mapped(draws[5 + k], size)) for k, size in enumerate((0.1, 10.0, 100.0))]
        made += [(f"all {value:g}", _filled(first, value)) for value in (0.0, 1.0, -1.0)]
        made.append(("waves", _waves(draws[8], rng)))
        made += _covering(model, runner, rng, batch)
        return made if true_inputs(model) else made[:1]
    raise failed or RuntimeError("no sizes were tried")


def _covering(model: ir.Model, runner: Single, rng: np.random.Generator, batch: int) -> list[tuple[str, Feeds]]:
    """Inputs of the longest sizes that run, in which integers take every row of the tables that they index."""
    tables = {value.name: table_size(value) for value in true_inputs(model) if value.dtype in (INT32, INT64)}
    if not any(tables.values()):
        return []
    for free in (512, 128, 64, 32, 24, 16, 8):
        feeds = random_inputs(model, rng, batch, free_size=free)
        try:
            runner.run(feeds)
        except Exception:
            continue
        made = []
        for k in range(_PIECES):
            filled = dict(feeds)
            for name, rows in tables.items():
                if name and rows and "mask" not in name.lower():
                    size = filled[name].size
                    ids = np.arange(k * size, (k + 1) * size) % rows
                    filled[name] = rng.permutation(ids).reshape(filled[name].shape).astype(filled[name].dtype)
            made.append((f"every row of the tables, part {k}", filled))
            if all((k + 1) * feeds[name].size >= rows for name, rows in tables.items() if name and rows):
                break
        return made
    return []


def _mapped(feeds: Feeds, size: float) -> Feeds:
    # A product of arrays without axes is a scalar of numpy, which onnxruntime does not take.
    return {
        k: np.asarray(v * v.dtype.type(size), v.dtype) if v.dtype.kind not in "iub" else v for k, v in feeds.items()
    }


def _filled(feeds: Feeds, value: float) -> Feeds:
    return {k: np.full_like(v, value) if v.dtype.kind not in "iub" else v for k, v in feeds.items()}


def _waves(feeds: Feeds, rng: np.random.Generator) -> Feeds:
    """Smooth along the last axis, as sound and pictures are, with an offset for each row."""
    made = {}
    for name, array in feeds.items():
        if array.dtype.kind in "iub" or array.ndim == 0:
            made[name] = array
            continue
        place = np.arange(array.shape[-1]) / max(array.shape[-1], 2)
        phase, offset = rng.uniform(0, 6, (*array.shape[:-1], 1)), rng.normal(size=(*array.shape[:-1], 1))
        made[name] = (np.sin(2 * np.pi * 2 * place + phase) + offset).astype(array.dtype)
    return made


# --- what an edit does ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """How far an edit moves the outputs.

    Attributes:
        verdict: "equivalent", "below rounding", "near rounding", "visible"; "unknown" where double precision fails.
        ratio: the largest of (move of a channel) / (rounding of that channel), over outputs, channels and inputs.
        where: the input and the output of the largest ratio, or why it is unknown.
    """

    verdict: str
    ratio: float
    where: str

    def __str__(self) -> str:
        return f"{self.verdict}, {self.ratio:.3g} times the rounding ({self.where})"


def effect(original: ir.Model, before: ir.Model, after: ir.Model, feeds: Sequence[tuple[str, Feeds]]) -> Effect:
    """Measure an edit of a model that is itself equal to an original up to rounding.

    Args:
        original: what the verification takes as right; its rounding is the measure.
        before: the model without the edit (the original, or a copy in another gauge).
        after: the model with the edit.
        feeds: inputs by name, as `probes` gives them.
    """
    try:
        runners = Double(original), Double(before), Double(after)
        single = Single(original), Single(before)
        moves = [_move(*runners, *single, name, given) for name, given in feeds]
    except Exception as error:
        return Effect("unknown", float("nan"), f"{type(error).__name__}: {str(error)[:200]}")
    ratio, where, _ = max(moves, key=lambda move: move[0])
    if max(move[2] for move in moves) <= EQUIVALENT:
        return Effect("equivalent", ratio, where)
    verdict = "visible" if ratio > NEAR else ("near rounding" if ratio > BELOW else "below rounding")
    return Effect(verdict, ratio, where)


HIDDEN = ("equivalent", "below rounding", "near rounding")
"""Verdicts on edits that a verification need not see."""


def _move(
    original: Double, before: Double, after: Double, first: Single, second: Single, name: str, feeds: Feeds
) -> tuple[float, str, float]:
    wide, old, new = original.run(feeds), before.run(feeds), after.run(feeds)
    rounded, also = first.run(feeds), second.run(feeds)
    worst = (0.0, name, 0.0)
    for key, value in old.items():
        worst = _larger(worst, _ratio(wide[key], rounded[key], also[key], value, new[key]), f"{name}, {key}")
    return worst


def _larger(worst: tuple[float, str, float], found: tuple[float, float], where: str) -> tuple[float, str, float]:
    relative = max(worst[2], found[1])
    return (found[0], where, relative) if found[0] > worst[0] else (worst[0], worst[1], relative)


def _ratio(wide: Array, first: Array, second: Array, old: Array, new: Array) -> tuple[float, float]:
    """(move over rounding, move over the largest value), the largest over channels."""
    if old.shape != new.shape:
        return np.inf, np.inf
    if old.dtype.kind not in "fc":
        return (np.inf, np.inf) if np.any(old != new) else (0.0, 0.0)
    finite = np.isfinite(old) & np.isfinite(new) & np.isfinite(first.astype(np.float64)) & np.isfinite(wide)
    if np.any(np.isfinite(old) != np.isfinite(new)):
        return np.inf, np.inf
    eps = 2.0**-24 if first.dtype != np.float16 else 2.0**-11
    move = by_channel(np.where(finite, np.abs(new - old), 0.0))
    size = by_channel(np.where(finite, np.abs(old), 0.0))
    with np.errstate(all="ignore"):
        noise = np.abs(first.astype(np.float64) - wide)
        noise = np.maximum(noise, np.abs(second.astype(np.float64) - wide))
        rounding = by_channel(np.where(finite, noise, 0.0)) + eps * size
        ratio = np.where(move > 0, move / np.maximum(rounding, 1e-300), 0.0)
        relative = np.where(move > 0, move / np.maximum(size, 1e-300), 0.0)
    return float(np.max(ratio, initial=0.0)), float(np.max(relative, initial=0.0))


def by_channel(array: Array) -> Array:
    """The largest entry of each channel: along the last axis or axis 1, whichever is longer; all where there is one."""
    if array.ndim < 2:
        return array
    axis = array.ndim - 1 if array.shape[-1] >= array.shape[1] else 1
    return np.asarray(np.max(array, axis=tuple(a for a in range(array.ndim) if a != axis), initial=0.0))
