"""Tiny models with one operator between free hidden units, and the checker that tests a rule's claims on them.

Both directions are checked by running the models. What the analysis claims must commute: random elements of all spaces
leave the outputs as they are. Elements just outside must not: where units may not be scaled (flipped, exchanged),
doing so to their producers, and undoing it in their consumers, changes the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from tests.zoo.net import Net

from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Feeds = dict[str, NDArray[Any]]
SAME, CHANGED = 1e-5, 1e-3
"""Largest difference, relative to the largest output, that rounding explains; smallest that counts as a change."""


class Side(NamedTuple):
    """An axis of a parameter that holds the units, `blocks` times after each other."""

    parameter: str
    axis: int
    blocks: int = 1


class Sample(Net):
    """A network under construction that remembers which parameters produce and which consume each set of units."""

    def __init__(self, name: str, opset: int) -> None:
        super().__init__(name, opset)
        self.makers: dict[str, list[Side]] = {}
        self.readers: dict[str, list[Side]] = {}
        self.feeds: Feeds = {}

    def source(self, shape: tuple[int, ...], *, positive: bool = False) -> str:
        """The graph input of this shape, made when first asked for."""
        name = f"x{len(shape)}"
        if name not in self.feeds:
            draw = self.rng.uniform(0.5, 1.5, shape) if positive else self.rng.standard_normal(shape)
            self.feeds[name] = draw.astype(np.float32)
            self.input(name, shape)
        return name

    def made(self, units: str, parameter: str, axis: int, blocks: int = 1) -> None:
        """Note that a parameter produces units."""
        self.makers.setdefault(units, []).append(Side(parameter, axis, blocks))

    def taken(self, units: str, parameter: str, axis: int, blocks: int = 1) -> None:
        """Note that a parameter consumes units."""
        self.readers.setdefault(units, []).append(Side(parameter, axis, blocks))

    # ------------------------------------------------------------ producers
    def vector(self, n: int = 6, units: str = "h", *, positive: bool = False, spread: float = 1.0) -> str:
        """(3, n) from the input (3, 4); all positive if asked."""
        return self._dense(self.source((3, 4), positive=positive), n, units, positive, spread)

    def sequence(self, n: int = 6, units: str = "h") -> str:
        """(2, 5, n) from the input (2, 5, 4)."""
        return self._dense(self.source((2, 5, 4)), n, units, False, 1.0)

    def _dense(self, x: str, n: int, units: str, positive: bool, spread: float) -> str:
        if positive:
            w, b = (self.const(self.rng.uniform(0.1, 0.5, s).astype(np.float32)) for s in ((4, n), (n,)))
        else:
            w, b = self.const(self.normal((4, n), 0.7 * spread), "w"), self.const(self.normal((n,), 0.3 * spread), "b")
        self.made(units, w, 1)
        self.made(units, b, 0)
        return self.op("Add", self.op("MatMul", x, w), b)

    def picture(self, n: int = 6, units: str = "h") -> str:
        """(2, n, 6, 6) from the input (2, 3, 6, 6)."""
        w, b = self.weight((n, 3, 3, 3), 27), self.bias(n)
        self.made(units, w, 0)
        self.made(units, b, 0)
        return self.op("Conv", self.source((2, 3, 6, 6)), w, b, kernel_shape=[3, 3], pads=[1] * 4)

    # ------------------------------------------------------------ consumers
    def read(self, h: str, n: int = 6, units: str = "h", *, image: bool = False) -> None:
        """A graph output that mixes the last axis of ``h`` (the channels of an image) down to 3."""
        if image:
            w = self.weight((3, n, 1, 1), n)
            self.taken(units, w, 1)
            self.result(self.op("Conv", h, w, kernel_shape=[1, 1]))
        else:
            w = self.weight((n, 3), n)
            self.taken(units, w, 0)
            self.result(self.op("MatMul", h, w))

    def read_cast(self, h: str, n: int = 6, units: str = "h", *, image: bool = False) -> None:
        """`read` of booleans or integers."""
        self.read(self.op("Cast", h, to=TensorProto.FLOAT), n, units, image=image)

    def result(self, value: str, elem: int = TensorProto.FLOAT) -> None:
        """A graph output of any shape."""
        info = onnx.ValueInfoProto()
        info.name = value
        info.type.tensor_type.elem_type = elem
        self.outputs.append(info)


@dataclass(frozen=True)
class Case:
    """One operator in one model; ``op`` has its domain in front where that is not ONNX's own.

    ``spaces``: every space of the model, sorted, as its monomial group; other kinds than units with the kind in front.
    ``coarse``: "units:scale", "units:sign" or "units:permute" with the reason why the rule claims less than is true.
    """

    op: str
    name: str
    write: Callable[[Sample], Any] = field(repr=False)
    spaces: tuple[str, ...]
    opset: int = 20
    coarse: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    @property
    def domain(self) -> str:
        """Domain of the operator."""
        return self.op.rpartition("::")[0]

    def holds(self, node: onnx.NodeProto) -> bool:
        """Whether a node is of this operator."""
        return (node.domain, node.op_type) == (self.domain, self.op.rpartition("::")[2])

    def build(self) -> tuple[onnx.ModelProto, Sample]:
        """The model and what was noted while it was written."""
        sample = Sample(self.name, self.opset)
        if self.domain:
            sample.domains[self.domain] = 1
        self.write(sample)
        model = sample.model()
        for output, shape in self.shapes.items():
            node = next(n for n in model.graph.node if n.op_type == output)
            info = onnx.helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, shape)
            model.graph.value_info.append(info)
        return model, sample


CASES: list[Case] = []


def case(
    op: str,
    *spaces: str,
    name: str = "",
    opset: int = 20,
    coarse: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Callable[[Callable[[Sample], Any]], Callable[[Sample], Any]]:
    """Add a case for an operator: the decorated function writes the model."""

    def add(write: Callable[[Sample], Any]) -> Callable[[Sample], Any]:
        label = name or getattr(write, "__name__", "case").strip("_")
        CASES.append(Case(op, f"{op}-{label}", write, tuple(sorted(spaces)), opset, coarse or {}, shapes or {}))
        return write

    return add


# ---------------------------------------------------------------- the checker
def describe(space: Space) -> str:
    """A space as the cases write it."""
    group = space.group.monomial_part.name
    return group if space.kind == "units" else f"{space.kind} {group}"


def difference(before: Mapping[str, NDArray[Any]], after: Mapping[str, NDArray[Any]]) -> float:
    """Largest difference relative to the largest output; infinite where shapes or NaNs differ."""
    worst = 0.0
    for name, a in before.items():
        a, b = a.astype(np.float64), after[name].astype(np.float64)
        if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        if a.size:
            scale = np.abs(np.where(np.isfinite(a), a, 0.0)).max() or 1.0
            worst = max(worst, float(np.abs(np.where(np.isfinite(a), a - b, 0.0)).max() / scale))
    return worst


def check(case_: Case) -> list[str]:
    """What is wrong with the claims made on a case: nothing, if the rules are right."""
    proto, sample = case_.build()
    program = Program.of(ir.from_proto(proto))
    expected = run(ir.from_proto(proto), sample.feeds)
    found = tuple(sorted(describe(s) for s in program.spaces))
    complaints = [] if found == case_.spaces else [f"spaces: {found}, not {case_.spaces}"]
    rng = np.random.default_rng(0)
    for _ in range(2):
        moved = program.act({s: s.random(rng) for s in program.spaces})
        complaints += _compare(expected, moved.emit(), sample.feeds, "all spaces at once")
    for units in sample.makers:
        complaints += _outside(case_, units, proto, sample, program, expected)
    return complaints


def _compare(expected: Mapping[str, NDArray[Any]], model: ir.Model, feeds: Feeds, what: str) -> list[str]:
    error = difference(expected, run(model, feeds))
    return [] if error <= SAME else [f"incorrect: {what} changes the outputs by {error:.1e}"]


def _outside(
    case_: Case, units: str, proto: onnx.ModelProto, sample: Sample, program: Program, expected: Mapping[str, Any]
) -> list[str]:
    """Elements that no space claims must not commute, unless the case says why the rule is coarse."""
    label = f"{sample.makers[units][0].parameter}[{sample.makers[units][0].axis}]"
    spaces = [s for s in program.spaces if s.kind == "units" and label in s.members]
    kinds = ["permute"] if not spaces else []
    kinds += [k for k, n in (("scale", "scales"), ("sign", "signs")) if all(not getattr(s.group, n) for s in spaces)]
    complaints = []
    for kind in kinds[:1] if not spaces else kinds:
        key = f"{units}:{kind}"
        error = difference(expected, run(ir.from_proto(naive(proto, sample, units, kind)), sample.feeds))
        if key in case_.coarse:
            if error > SAME:
                complaints.append(f"stale: {key} is called coarse, but changes the outputs by {error:.1e}")
        elif error < CHANGED:
            complaints.append(f"missing: {key} is not claimed, but commutes ({error:.1e})")
    return complaints


def naive(proto: onnx.ModelProto, sample: Sample, units: str, kind: str) -> onnx.ModelProto:
    """Move producers of some units and undo it in their consumers, as if nothing but a wire lay between."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    tensors = {t.name: t for t in changed.graph.initializer}
    for sides, inverse in ((sample.makers[units], False), (sample.readers.get(units, []), True)):
        for side in sides:
            array = numpy_helper.to_array(tensors[side.parameter])
            moved = _moved(array, side, kind, inverse).astype(array.dtype)
            tensors[side.parameter].CopyFrom(numpy_helper.from_array(moved, side.parameter))
    return changed


def _moved(array: NDArray[Any], side: Side, kind: str, inverse: bool) -> NDArray[Any]:
    n = array.shape[side.axis] // side.blocks
    if kind == "permute":
        order = np.roll(np.r_[np.arange(0, n, 2), np.arange(1, n, 2)], 1)
        return array.take(np.concatenate([order + k * n for k in range(side.blocks)]), axis=side.axis)
    if array.dtype.kind != "f":
        return array
    factor = np.resize([2.0, 0.5, 0.5, 0.25, 4.0, 1.0] if kind == "scale" else [1.0, -1.0], n)
    factor = np.tile(1.0 / factor if inverse else factor, side.blocks)
    return np.asarray(array * factor.reshape([-1 if a == side.axis else 1 for a in range(array.ndim)]))
