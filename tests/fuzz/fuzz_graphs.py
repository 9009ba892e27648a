"""Random ONNX graphs, many of them odd: a growing pool of values of known shapes, and one method per kind of step.

`random_model(seed)` is a valid float64 model (opsets 13 to 23); the same seed always gives the same one. A step that
does not fit the value that it was offered raises `Unfit`, and another one is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from tests.fuzz.fuzz_layers import Layers
from tests.fuzz.fuzz_pool import LARGEST, Unfit


class Fuzz(Layers):
    """A graph that grows step by step."""

    # ------------------------------------------------------------ the graph
    def begin(self) -> None:
        batch: int | str = "N" if self.dynamic else 2
        for k in range(int(self.pick([1, 1, 2]))):
            shape = self.pick([(2, 5), (2, 5, 4), (2, 5, 4), (2, 3, 4, 4), (2, 3, 4, 4)])
            name = self.input(f"x{k}", [batch, *shape[1:]])
            self.shapes[name] = shape
            self.pool.append(name)
            step = self.conv_step if len(shape) == 4 else self.linear_step
            self.pool.append(step(name))

    def grow(self, steps: int) -> None:
        """Add this many steps; those that do not fit are taken back."""
        menu = [
            (step, weight) for name, weight in MENU.items() for step in [getattr(self, f"{name}_step")]
        ]  # fmt: skip
        chances = np.asarray([w for _, w in menu], float)
        count = 0
        for _ in range(10 * steps):
            if count >= steps:
                return
            step: Callable[[str], str] = menu[int(self.rng.choice(len(menu), p=chances / chances.sum()))][0]
            before = len(self.nodes), len(self.initializers), len(self.pool)
            try:
                self.pool.append(step(self.recent()))
                count += 1
            except Unfit:
                self.take_back(*before)

    def take_back(self, nodes: int, initializers: int, pool: int) -> None:
        """Forget what an unfit step left behind."""
        gone = {t.name for t in self.initializers[initializers:]}
        self.weights = {s: [w for w in known if w not in gone] for s, known in self.weights.items()}
        del self.nodes[nodes:], self.initializers[initializers:], self.pool[pool:]

    def finish(self) -> None:
        """One to three outputs: what nothing reads yet, mostly behind a linear map."""
        read = {i for node in self.nodes for i in node.input}
        loose = [v for v in self.pool[1:] if v not in read] or self.pool[-1:]
        for x in loose[-3:]:
            shape = self.shapes[x]
            if len(shape) > 1 and 3 * math.prod(shape[:-1]) <= LARGEST and self.chance(0.85):
                x = self.made((*shape[:-1], 3), "MatMul", x, self.param((shape[-1], 3), shape[-1]))
            else:
                x = self.same("Identity", x)
            batch: int | str = "N" if self.dynamic else self.shapes[x][0]
            self.output(x, [batch, *self.shapes[x][1:]])


MENU = {
    "linear": 9, "gemm": 5, "conv": 9, "conv_transpose": 1, "einsum": 2, "product": 2, "unary": 9, "binary": 10,
    "condition": 1, "concat": 5, "split": 4, "slice": 4, "gather": 5, "scatter": 1, "ordered": 1, "transpose": 4,
    "reshape": 7, "rank": 3, "repeat": 3, "pad": 3, "space": 2, "reduce": 4, "norm": 4, "pool": 2, "residual": 3,
    "shuffle": 3, "gate": 1, "attention": 3,
}  # fmt: skip
"""The steps and how often they are offered."""


def random_model(seed: int, steps: int | None = None) -> onnx.ModelProto:
    """A valid float64 model of about 10 to 25 nodes; the same for the same seed."""
    fuzz = Fuzz(seed)
    fuzz.begin()
    fuzz.grow(int(fuzz.rng.integers(4, 14)) if steps is None else steps)
    fuzz.finish()
    return pruned(fuzz.model())


def pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the nodes, parameters and inputs that no output needs."""
    graph, needed = model.graph, {o.name for o in model.graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    for field, kept in (
        (graph.node, nodes[::-1]),
        (graph.initializer, [t for t in graph.initializer if t.name in needed]),
        (graph.input, [v for v in graph.input if v.name in needed]),
    ):
        del field[:]
        field.extend(kept)
    return model


def random_feeds(model: onnx.ModelProto, seed: int, batch: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs for a model of `random_model`."""
    rng = np.random.default_rng([7, seed])
    shapes = {v.name: [d.dim_value or batch for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}
