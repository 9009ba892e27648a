"""Every operator on every kind of input state: the variants, generated from the registry's cases, and their checker.

An operator is cut out of the case that holds it, with the values of its inputs. Each input in turn is then put into
every state that a value can be in (free, joint, uniform, fixed, repeated), with the other inputs in several states.
Behind the operator its output is contracted with parameters: axis by axis, or flattened. What the rule claims of the
output, the analysis then claims of these parameters, and random elements of all spaces show whether it is true.

All variants of a case are one model without edges between them, so that one analysis and two runs serve them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.registry_sample import Case

Array = NDArray[Any]
INDICES = {np.dtype(np.int64)}
"""Integers of this type are sizes, axes and positions: an operator's literals, which are left as they are."""


@dataclass
class Site:
    """One node of a case with the values of its inputs, None where an input is left out."""

    case: str
    node: onnx.NodeProto
    opset: int
    arrays: list[Array | None]
    shapes: list[tuple[int, ...] | None]
    types: list[int]

    @property
    def varied(self) -> list[int]:
        """Inputs that can be in different states: tensors of numbers or conditions that are no literals."""
        return [
            k for k, a in enumerate(self.arrays) if a is not None and a.size > 1 and a.dtype not in INDICES
            and not (self.node.op_type in ("Resize", "Upsample") and k > 0)
        ]  # fmt: skip


# ---------------------------------------------------------------- states
def states(shape: tuple[int, ...]) -> Iterator[str]:
    """Names of the states that a value of this shape can be in."""
    yield "free"
    yield "fixed"
    long = [a for a, n in enumerate(shape) if n > 1]
    for a in long:
        yield f"uniform {a}"
        if len(long) > 1:
            yield f"uniform {a} fixed"
        yield f"tiled {a}"
        if shape[a] % 2 == 0:
            yield f"runs {a}"
    for a, b in zip(long, long[1:], strict=False):
        if b == a + 1:
            yield f"joint {a}"
    if len(long) > 1:
        yield "uniform"
    if len(long) > 2:
        yield "joint"


@dataclass
class Bench:
    """One model under construction, with the values that feed it."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    feeds: dict[str, Array] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    """Variant of each output of an operator under test."""
    ends: dict[str, list[str]] = field(default_factory=dict)
    """Graph outputs of each variant."""
    count: int = 0

    def name(self, stem: str) -> str:
        """A fresh name."""
        self.count += 1
        return f"{stem}_{self.count}"

    def const(self, array: Any, stem: str = "c") -> str:
        """An initializer."""
        name = self.name(stem)
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def fed(self, array: Array) -> str:
        """A graph input."""
        name = self.name("x")
        self.feeds[name] = array
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        name = self.name(op_type.lower())
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    # ------------------------------------------------------------ sources
    def source(self, array: Array, state: str) -> str:
        """A value with this array's shape and type, and entries from it, in a state."""
        if array.dtype == bool:  # conditions carry labels where they are computed from what does
            return self.op("Cast", self.source(array.astype(np.float32), state), to=TensorProto.BOOL)
        kind, *rest = state.split()
        axis = int(rest[0]) if rest else -1
        shape = np.asarray(array.shape, np.int64)
        if kind == "fixed":
            return self.fed(array)
        if kind == "uniform":
            small = array.take([0], axis=axis) if rest else array.reshape(-1)[:1].reshape([1] * array.ndim)
            made = self.fed(small) if len(rest) > 1 else self.const(small, "w")
            return self.op("Expand", made, self.const(shape))
        if kind == "joint":
            new = [*shape[:axis], -1, *shape[axis + 2 :]] if rest else [-1]
            return self.op("Reshape", self.const(array.reshape(new), "w"), self.const(shape))
        if kind in ("tiled", "runs"):
            n = array.shape[axis]
            place = np.arange(n) // 2 if kind == "runs" else np.arange(n) % max(n // 2, 1)
            small = self.const(array.take(range(int(place.max()) + 1), axis=axis), "w")
            return self.op("Gather", small, self.const(place), axis=axis)
        return self.const(array, "w")

    # ------------------------------------------------------------ consumers
    def contract(self, value: str, shape: tuple[int, ...], rng: np.random.Generator) -> str:
        """Contract every axis with a parameter of its own."""
        for k in range(len(shape)):
            n = shape[-1 - k]
            value = self.op("MatMul", value, self.const(rng.standard_normal((n, 2)).astype(np.float32), "v"))
            if len(shape) > 1:
                value = self.op("Transpose", value, perm=[len(shape) - 1, *range(len(shape) - 1)])
        return value

    def flatten(self, value: str, shape: tuple[int, ...], rng: np.random.Generator) -> str:
        """Contract all axes as one."""
        weight = self.const(rng.standard_normal((math.prod(shape), 2)).astype(np.float32), "v")
        return self.op("MatMul", self.op("Reshape", value, self.const(np.array([-1]))), weight)

    def variant(self, site: Site, given: list[str], label: str, rng: np.random.Generator) -> None:
        """The operator on inputs in these states, and its consumers."""
        for how in ("axes", "flat"):
            names = [
                "" if a is None else self.source(a, s) if s else self.const(a)
                for a, s in zip(site.arrays, given, strict=True)
            ]
            node = onnx.NodeProto()
            node.CopyFrom(site.node)
            node.name = self.name(site.node.op_type)
            outs = [self.name("y") if o else "" for o in site.node.output]
            del node.input[:], node.output[:]
            node.input.extend(names)
            node.output.extend(outs)
            self.nodes.append(node)
            title = f"{label}, {how}"
            for out, shape, kind in zip(outs, site.shapes, site.types, strict=True):
                if shape is None or 0 in shape:
                    continue
                self.seen[out] = title
                value = out if kind == TensorProto.FLOAT else self.op("Cast", out, to=TensorProto.FLOAT)
                end = (self.contract if how == "axes" else self.flatten)(value, shape, rng)
                info = onnx.ValueInfoProto()
                info.name = end
                info.type.tensor_type.elem_type = TensorProto.FLOAT
                self.outputs.append(info)
                self.ends.setdefault(title, []).append(end)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(self.nodes, "bench", self.inputs, self.outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=imports)
        model.ir_version = max(9, helper.find_min_ir_version_for(imports))
        return model


def combinations(site: Site) -> Iterator[tuple[str, list[str]]]:
    """Each input in every state, beside others that are free, fixed, uniform, or in the same state."""
    varied = site.varied
    others = ("free", "fixed", "uniform", "same") if 1 < len(varied) < 4 else ("free", "fixed") if varied[1:] else ("",)
    done = set()
    for k in varied:
        array = site.arrays[k]
        assert array is not None
        for state in states(array.shape):
            for other in others:
                given = [""] * len(site.arrays)
                for j in varied:
                    given[j] = state if j == k else _other(site, state, other, j, k)
                if tuple(given) not in done:
                    done.add(tuple(given))
                    yield ", ".join(f"{j}: {given[j]}" for j in varied), given


def _other(site: Site, state: str, other: str, j: int, k: int) -> str:
    mine, its = site.arrays[j], site.arrays[k]
    assert mine is not None and its is not None
    if other != "same":
        return other
    kind, *rest = state.split()
    if not rest:
        return state if state in set(states(mine.shape)) else "free"
    aligned = " ".join([kind, str(int(rest[0]) - its.ndim + mine.ndim), *rest[1:]])
    return aligned if aligned in set(states(mine.shape)) else "free"


def bench(site: Site) -> Bench:
    """All variants of a site in one model."""
    made, rng = Bench(max(site.opset, 8)), np.random.default_rng(0)
    for label, given in combinations(site):
        made.variant(site, given, label, rng)
    return made
