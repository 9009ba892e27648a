"""Small models with units inside bodies of If, Loop and Scan, and data that runs every body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray
F, INT, B = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


@dataclass
class Body:
    """A graph under construction; weights are its initializers, or Constant nodes with ``constant``."""

    rng: np.random.Generator
    constant: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    inits: list[Any] = field(default_factory=list)

    def weight(self, name: str, *shape: int, values: Array | None = None) -> str:
        array = (self.rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) if values is None else values
        return self.number(name, array)

    def number(self, name: str, array: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if self.constant:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.inits.append(tensor)
        return name

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=f"{output}_{op_type}", **attributes))
        return output

    def either(self, flag: str, output: str, branches: tuple[Body, Body], result: str, width: int) -> str:
        """An If between two bodies that give out the same value of (N, width)."""
        then, other = (body.graph([], [(result, F, ["N", width])]) for body in branches)
        return self.op("If", [flag], output, then_branch=then, else_branch=other)

    def mlp(self, x: str, out: str, prefix: str, sizes: tuple[int, int, int], act: str = "Relu") -> str:
        """Two products with ``sizes[1]`` units between them."""
        n, m, k = sizes
        self.op("MatMul", [x, self.weight(f"{prefix}a", n, m)], f"{prefix}h")
        self.op("Add", [f"{prefix}h", self.weight(f"{prefix}c", m)], f"{prefix}s")
        self.op(act, [f"{prefix}s"], f"{prefix}r")
        return self.op("MatMul", [f"{prefix}r", self.weight(f"{prefix}b", k and m, k)], out)

    def graph(self, inputs: Sequence[tuple[str, int, Any]], outputs: Sequence[tuple[str, int, Any]]) -> GraphProto:
        def infos(values: Sequence[tuple[str, int, Any]]) -> list[Any]:
            return [helper.make_tensor_value_info(*value) for value in values]

        return helper.make_graph(self.nodes, "body", infos(inputs), infos(outputs), self.inits)


def made(graph: GraphProto, **more: Any) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9, **more)


def _flag(main: Body) -> str:
    """The condition of an If: a number of the input is positive."""
    main.op("ReduceMax", ["flag"], "top", keepdims=0)
    return main.op("Greater", ["top", main.number("nothing", np.float32(0))], "go")


IN = [("x", F, ["N", 6]), ("flag", F, ["N", 1])]
OUT = [("y", F, ["N", 4])]


def branches(*, constant: bool = False, seed: int = 0) -> onnx.ModelProto:
    """An If whose branches use the same names; both read 16 units of the graph around them, which stay free."""
    rng = np.random.default_rng(seed)
    main, yes, no = Body(rng, constant), Body(rng, constant), Body(rng, constant)
    main.op("Relu", [main.op("MatMul", ["x", main.weight("w", 6, 16)], "p")], "h")
    yes.mlp("h", "out", "m", (16, 12, 8))
    no.mlp("h", "out", "m", (16, 10, 8), "Tanh")
    main.either(_flag(main), "z", (yes, no), "out", 8)
    main.op("MatMul", ["z", main.weight("v", 8, 4)], "y")
    return made(main.graph(IN, OUT))


def shared(*, seed: int = 0) -> onnx.ModelProto:
    """An If whose branches use the same two outer matrices; one of them is used in the main graph too."""
    rng = np.random.default_rng(seed)
    main, yes, no = Body(rng), Body(rng), Body(rng)
    for name, shape in (("a", (6, 12)), ("b", (12, 6)), ("c", (12,))):
        main.weight(name, *shape)
    for body, act in ((yes, "Relu"), (no, "Sigmoid")):
        body.op("Add", [body.op("MatMul", ["x", "a"], "p"), "c"], "q")
        body.op("MatMul", [body.op(act, ["q"], "r"), "b"], "out")
    main.either(_flag(main), "z", (yes, no), "out", 6)
    main.op("Relu", [main.op("MatMul", ["z", "a"], "k")], "l")
    main.op("MatMul", ["l", main.weight("v", 12, 4)], "y")
    return made(main.graph(IN, OUT))


def nested(*, seed: int = 0) -> onnx.ModelProto:
    """An If inside a branch of an If, with weights in Constant nodes, a Reshape that names a size, and no outer use."""
    rng = np.random.default_rng(seed)
    main, yes, no = Body(rng), Body(rng, constant=True), Body(rng, constant=True)
    inner = [Body(rng, constant=True), Body(rng, constant=True)]
    main.op("Identity", ["x"], "x0")
    yes.op("Relu", [yes.op("MatMul", ["x0", yes.weight("w1", 6, 12)], "p")], "h")
    yes.op("Reshape", ["h", yes.number("as", np.array([-1, 3, 4]))], "t")  # heads of four
    yes.op("Reshape", ["t", yes.number("back", np.array([-1, 12]))], "u")
    for k, body in enumerate(inner):
        body.mlp("u", "end", "n", (12, 8 + k, 8))
    yes.op("ReduceSum", ["x0"], "total", keepdims=0)
    yes.op("Greater", ["total", yes.number("zero", np.float32(0))], "more")
    yes.either("more", "out", (inner[0], inner[1]), "end", 8)
    no.mlp("x0", "out", "m", (6, 9, 8))
    main.either(_flag(main), "z", (yes, no), "out", 8)
    main.op("MatMul", ["z", main.weight("v", 8, 4)], "y")
    return made(main.graph(IN, OUT))


def looped(*, seed: int = 0, trips: int = 3) -> onnx.ModelProto:
    """A Loop that carries a state through a cell with 12 units inside; the scanned outputs are summed."""
    rng = np.random.default_rng(seed)
    main, body = Body(rng), Body(rng)
    main.op("Relu", [main.op("MatMul", ["x", main.weight("w", 6, 16)], "p")], "outer")
    main.op("MatMul", ["x", main.weight("w0", 6, 8)], "h0")
    body.mlp("h", "step", "m", (8, 12, 8))
    body.op("MatMul", ["outer", body.weight("u", 16, 8)], "drive")
    body.op("Add", ["step", "drive"], "sum")
    body.op("Tanh", ["sum"], "h1")
    body.op("Identity", ["h1"], "each")
    body.op("Identity", ["cond"], "cond1")
    graph = body.graph(
        [("i", INT, []), ("cond", B, []), ("h", F, ["N", 8])],
        [("cond1", B, []), ("h1", F, ["N", 8]), ("each", F, ["N", 8])],
    )
    main.number("count", np.int64(trips))
    main.number("true", np.array(True))
    main.nodes.append(helper.make_node("Loop", ["count", "true", "h0"], ["hT", "all"], name="loop", body=graph))
    main.op("ReduceSum", ["all", main.number("axis", np.array([0]))], "total", keepdims=0)
    main.op("Add", ["hT", "total"], "both")
    main.op("MatMul", ["both", main.weight("v", 8, 4)], "z")
    main.op("Mul", ["z", "flag"], "y")
    return made(main.graph(IN, OUT))


def scanned(*, seed: int = 0) -> onnx.ModelProto:
    """A Scan over time with a recurrent cell: a gate of 10 units inside, its state crosses the border."""
    rng = np.random.default_rng(seed)
    main, body = Body(rng), Body(rng)
    body.op("MatMul", ["xt", body.weight("wx", 6, 8)], "px")
    body.mlp("h", "ph", "m", (8, 10, 8), "Tanh")
    body.op("Tanh", [body.op("Add", ["px", "ph"], "sum")], "h1")
    body.op("Identity", ["h1"], "yt")
    graph = body.graph([("h", F, ["N", 8]), ("xt", F, ["N", 6])], [("h1", F, ["N", 8]), ("yt", F, ["N", 8])])
    main.op("MatMul", ["x", main.weight("w0", 6, 8)], "h0")
    main.nodes.append(
        helper.make_node(
            "Scan", ["h0", "seq"], ["hT", "ys"], name="scan", body=graph, num_scan_inputs=1, scan_input_axes=[1]
        )
    )
    main.op("ReduceMean", ["ys"], "mean", axes=[0], keepdims=0)
    main.op("MatMul", [main.op("Add", ["hT", "mean"], "both"), main.weight("v", 8, 4)], "z")
    main.op("Mul", ["z", "flag"], "y")
    return made(main.graph([*IN, ("seq", F, ["N", 5, 6])], OUT))


def convolved(*, seed: int = 0) -> onnx.ModelProto:
    """Convolutions with batch normalizations in both branches, and a flattened end."""
    rng = np.random.default_rng(seed)
    main = Body(rng)
    parts = []
    for width in (6, 5):
        body = Body(rng)
        body.op("Conv", ["img", body.weight("k1", width, 2, 3, 3)], "c1", pads=[1, 1, 1, 1])
        gain, shift = body.weight("g", values=_near(rng, width, 1)), body.weight("s", values=_near(rng, width, 0))
        mean, var = body.weight("mu", values=_near(rng, width, 0)), body.weight("va", values=_near(rng, width, 2))
        body.op("BatchNormalization", ["c1", gain, shift, mean, var], "n1")
        body.op("Conv", [body.op("Relu", ["n1"], "r1"), body.weight("k2", 3, width, 3, 3)], "c2")
        body.op("Flatten", ["c2"], "f")
        body.mlp("f", "out", "m", (12, 7, 8))
        parts.append(body.graph([], [("out", F, ["N", 8])]))
    main.op("Reshape", ["x", main.number("as", np.array([-1, 6, 1, 1]))], "x4")
    main.op("Tile", ["x4", main.number("reps", np.array([1, 1, 4, 4]))], "wide")
    main.op("Conv", ["wide", main.weight("k0", 2, 6, 1, 1)], "img")
    main.op("If", [_flag(main)], "z", then_branch=parts[0], else_branch=parts[1])
    main.op("MatMul", ["z", main.weight("v", 8, 4)], "y")
    return made(main.graph(IN, OUT))


def _near(rng: np.random.Generator, size: int, centre: float) -> Array:
    return (centre + 0.3 * rng.standard_normal(size)).astype(np.float32)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "branches": branches,
    "branches in Constants": lambda: branches(constant=True),
    "shared": shared,
    "nested": nested,
    "looped": looped,
    "scanned": scanned,
    "convolved": convolved,
}
UNITS = {
    "branches": 16 + 12 + 10 + 8,
    "branches in Constants": 16 + 12 + 10 + 8,
    "shared": 12,
    "nested": 12 + 8 + 9 + 9 + 8,
    "looped": 16 + 12,
    "scanned": 10,
    "convolved": 2 + 6 + 3 + 7 + 5 + 3 + 7 + 8,
}
"""How many units each has, counted by hand from the sizes above: everything between two products, what bodies read of
the main graph, and what all branches of an If give to a product."""


def feeds(proto: onnx.ModelProto, *, yes: bool, seed: int = 3, batch: int = 7) -> dict[str, Array]:
    """One input for a model; ``yes`` says which branch the outermost If takes."""
    rng = np.random.default_rng(seed)
    found = {}
    for info in proto.graph.input:
        shape = [d.dim_value or batch for d in info.type.tensor_type.shape.dim]
        found[info.name] = rng.standard_normal(shape).astype(np.float32)
    found["flag"] = np.full((batch, 1), 1.5 if yes else -1.5, np.float32)
    return found


def every_way(proto: onnx.ModelProto) -> list[dict[str, Array]]:
    """Inputs that take all branches of all models above: the inner condition is the sign of a sum."""
    made = [feeds(proto, yes=yes, seed=seed) for yes in (True, False) for seed in range(4)]
    sums = {bool(one["x"].sum() > 0) for one in made if one["flag"][0, 0] > 0}
    assert sums == {True, False}
    return made
