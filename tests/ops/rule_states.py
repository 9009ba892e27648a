"""Every operator on every kind of input state: the variants, generated from the registry's cases, and their checker.

An operator is cut out of the case that holds it, with the values of its inputs. Each input in turn is then put into
every state that a value can be in (free, joint, uniform, fixed, repeated), with the other inputs in several states.
Behind the operator its output is contracted with parameters: axis by axis, or flattened. What the rule claims of the
output, the analysis then claims of these parameters, and random elements of all spaces show whether it is true.

All variants of a case are one model without edges between them, so that one analysis and two runs serve them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tests.ops.sample import Case

from cipm_ir.runtime.session import Runner

Array = NDArray[Any]
SIZES_BY_CONTENT = ("NonZero", "Compress", "Unique", "NonMaxSuppression")
"""Operators whose output may have another shape in every variant."""


@dataclass
class Site:
    """One node of a case with the values of its inputs, None where an input is left out."""

    case: str
    node: onnx.NodeProto
    opset: int
    arrays: list[Array | None]
    shapes: list[tuple[int, ...] | None]
    """Of the outputs; None where an output is left out."""
    types: list[int]

    @classmethod
    def all_of(cls, case: Case) -> list[Site]:
        """Run a case and cut every node with its operator out."""
        proto, sample = case.build()
        nodes = [n for n in proto.graph.node if case.holds(n)]
        values: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer} | sample.feeds
        computed = {name for n in proto.graph.node for name in n.output if name}
        wanted = sorted({name for n in nodes for name in (*n.input, *n.output)} & computed)
        with Runner(ir.from_proto(proto), extra_outputs=wanted) as runner:
            values |= runner.run(sample.feeds)
        found = []
        for node in nodes:
            given, outs = ([values[name] if name else None for name in names] for names in (node.input, node.output))
            shapes = [None if v is None else v.shape for v in outs]
            types = [0 if v is None else helper.np_dtype_to_tensor_dtype(v.dtype) for v in outs]
            found.append(cls(case.name, node, proto.opset_import[0].version, given, shapes, types))
        return found

    @property
    def kind(self) -> tuple[object, ...]:
        """What tells this use of the operator from others: attributes, sizes, and which inputs are literals."""
        bare = onnx.NodeProto(op_type=self.node.op_type, domain=self.node.domain, attribute=self.node.attribute)
        given = [None if a is None else (a.shape, a.dtype.str, a.tobytes() if k not in self.varied else b"")
                 for k, a in enumerate(self.arrays)]  # fmt: skip
        return bare.SerializeToString(), self.opset, tuple(given), tuple(self.shapes)

    @property
    def varied(self) -> list[int]:
        """Inputs that can be in different states: tensors, but for sizes, axes and positions."""
        last = 1 if self.node.op_type in ("Resize", "Upsample", "MaxRoiPool", "RoiAlign") else len(self.arrays)
        return [
            k
            for k, a in enumerate(self.arrays[:last])
            if a is not None and a.size > 1 and a.dtype != np.dtype(np.int64)
        ]


def opsets(opset: int, nodes: Sequence[onnx.NodeProto]) -> list[onnx.OperatorSetIdProto]:
    """ONNX's own operator set, and version 1 of every other domain of the nodes."""
    return [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(d, 1) for d in sorted({n.domain for n in nodes} - {""})),
    ]


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
        if shape[a] > 3:
            yield f"tiled {a}"
            yield f"runs {a}"
    for a, b in itertools.pairwise(long):
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
    shapes: list[onnx.ValueInfoProto] = field(default_factory=list)
    feeds: dict[str, Array] = field(default_factory=dict)
    given: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """States of all inputs of each variant."""
    seen: dict[str, str] = field(default_factory=dict)
    """Variant of each output of an operator under test."""
    ends: dict[str, list[str]] = field(default_factory=dict)
    """Graph outputs of each variant."""
    parameters: dict[str, dict[int, str]] = field(default_factory=dict)
    """The parameter that each input of the operator is made of, by variant."""
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
    def root(self, array: Array, dynamic: bool) -> str:
        """A parameter; where it is ``dynamic``, times one from outside, so that nothing is evaluated beforehand."""
        name = self.const(array, "w")
        if not dynamic or array.dtype != np.float32:
            return name
        if "one" not in self.feeds:
            self.feeds["one"] = np.ones((), np.float32)
            self.inputs.append(helper.make_tensor_value_info("one", TensorProto.FLOAT, []))
        return self.op("Mul", name, "one")

    def source(self, array: Array, state: str, dynamic: bool) -> str:
        """A value with this array's shape and type, and entries from it, in a state."""
        if array.dtype == bool or (array.dtype.kind in "iu" and (dynamic or state not in ("free", "fixed"))):
            # of constants, a rule would see numbers and no labels
            target = helper.np_dtype_to_tensor_dtype(array.dtype)
            return self.op("Cast", self.source(array.astype(np.float32), state, True), to=target)
        kind, *rest = state.split()
        axis = int(rest[0]) if rest else -1
        shape = np.asarray(array.shape, np.int64)
        if kind == "fixed":
            return self.fed(array)
        if kind == "uniform":
            one = array.take([0], axis=axis) if rest else array.reshape(-1)[:1].reshape([1] * array.ndim)
            made = self.fed(one) if len(rest) > 1 else self.root(one, dynamic)
            return self.op("Expand", made, self.const(shape))
        if kind == "joint":
            new = [*shape[:axis], -1, *shape[axis + 2 :]] if rest else [-1]
            return self.op("Reshape", self.root(array.reshape(new), dynamic), self.const(shape))
        if kind in ("tiled", "runs"):
            n = array.shape[axis]
            place = np.arange(n) // 2 if kind == "runs" else np.arange(n) % (n // 2)
            small = self.root(array.take(range(int(place.max()) + 1), axis=axis), dynamic)
            return self.op("Gather", small, self.const(place), axis=axis)
        return self.root(array, dynamic)

    # ------------------------------------------------------------ consumers
    def contract(self, value: str, shape: tuple[int, ...], rng: np.random.Generator) -> str:
        """Contract every axis with a parameter of its own: two at a time, from the right and from the left."""
        rank = len(shape)
        for done in range(0, rank, 2):
            if done:
                value = self.op("Transpose", value, perm=[rank - 2, rank - 1, *range(rank - 2)])
            right = rng.standard_normal((shape[rank - 1 - done], 2)).astype(np.float32)
            value = self.op("MatMul", value, self.const(right, "v"))
            if done + 1 < rank:
                left = rng.standard_normal((2, shape[rank - 2 - done])).astype(np.float32)
                value = self.op("MatMul", self.const(left, "v"), value)
        return value

    def flatten(self, value: str, shape: tuple[int, ...], rng: np.random.Generator) -> str:
        """Contract all axes as one."""
        weight = self.const(rng.standard_normal((math.prod(shape), 2)).astype(np.float32), "v")
        return self.op("MatMul", self.op("Reshape", value, self.const(np.array([-1]))), weight)

    def variant(self, site: Site, given: Sequence[str], how: str, rng: np.random.Generator) -> None:
        """The operator on inputs in these states, and its consumers: by "axes", or "flat"."""
        title = ", ".join(f"{k}: {state}" for k, state in enumerate(given) if state) + f"; {how}"
        self.given[title] = tuple(given)
        inputs = []
        for k, (array, state) in enumerate(zip(site.arrays, given, strict=True)):
            first = len(self.initializers)
            if array is None:
                inputs.append("")
            else:  # the first input is data; a rule may ask of the others whether they are parameters
                inputs.append(self.source(array, state, k == site.varied[0]) if state else self.const(array))
            if state and len(self.initializers) > first:
                self.parameters.setdefault(title, {})[k] = self.initializers[first].name
        node = onnx.NodeProto()
        node.CopyFrom(site.node)
        node.name = self.name(site.node.op_type)
        outs = [self.name("y") if name else "" for name in site.node.output]
        del node.input[:], node.output[:]
        node.input.extend(inputs)
        node.output.extend(outs)
        self.nodes.append(node)
        for out, shape, kind in zip(outs, site.shapes, site.types, strict=True):
            if shape is None or 0 in shape:
                continue
            self.seen[out] = title
            if site.node.op_type not in SIZES_BY_CONTENT:
                self.shapes.append(helper.make_tensor_value_info(out, kind, shape))
            value = out if kind == TensorProto.FLOAT else self.op("Cast", out, to=TensorProto.FLOAT)
            if site.node.op_type not in SIZES_BY_CONTENT:
                value = (self.contract if how == "axes" else self.flatten)(value, shape, rng)
            info = onnx.ValueInfoProto()
            info.name = value
            info.type.tensor_type.elem_type = TensorProto.FLOAT
            self.outputs.append(info)
            self.ends.setdefault(title, []).append(value)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, "bench", self.inputs, self.outputs, self.initializers, value_info=self.shapes
        )
        imports = opsets(self.opset, self.nodes)
        model = helper.make_model(graph, opset_imports=imports)
        model.ir_version = max(9, helper.find_min_ir_version_for(imports[:1]))
        return model


def combinations(site: Site) -> Iterator[tuple[str, ...]]:
    """States of all inputs: each input in every state, beside others that are free, fixed, uniform, or in the same."""
    varied = site.varied
    others = ("free", "fixed", "uniform", "same") if 1 < len(varied) < 4 else ("free", "fixed") if varied[1:] else ("",)
    done = set()
    for k in varied:
        for state in states(_array(site, k).shape):
            for other in others:
                given = [""] * len(site.arrays)
                for j in varied:
                    given[j] = state if j == k else _other(site, state, other, j, k)
                if tuple(given) not in done:
                    done.add(tuple(given))
                    yield tuple(given)


def _array(site: Site, k: int) -> Array:
    array = site.arrays[k]
    assert array is not None
    return array


def _other(site: Site, state: str, other: str, j: int, k: int) -> str:
    """State of input ``j`` where input ``k`` is in ``state``; axes are aligned from the right."""
    mine = _array(site, j)
    if other != "same":
        return other
    kind, *rest = state.split()
    if rest:
        kind = " ".join([kind, str(int(rest[0]) - _array(site, k).ndim + mine.ndim), *rest[1:]])
    return kind if kind in set(states(mine.shape)) else "free"


def selected(site: Site, *, thorough: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    """States of all inputs and how the output is contracted: all that there are, or those that tell most.

    The selection is a sample of what goes beyond one input in an unusual state. Flat are only joint inputs here.
    """
    rng = np.random.default_rng(0)
    for given in combinations(site):
        unusual = {state for state in given if state not in ("", "free")}
        share = (0.2 if len(unusual) > 1 else 1.0) / (1 if len(site.varied) < 3 else 2)
        if not thorough and rng.random() > share:
            continue
        yield given, "axes"
        if any(state.startswith("joint") for state in given):
            yield given, "flat"


def bench(site: Site, variants: Iterable[tuple[tuple[str, ...], str]]) -> Bench:
    """Variants of a site in one model."""
    made, rng = Bench(max(site.opset, 8)), np.random.default_rng(0)
    for given, how in variants:
        made.variant(site, given, how, rng)
    return made
