"""Models whose weights a test changes by node, and how far a pass changes their outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper
from tests import zoo
from tests.zoo.feeds import Feeds
from tests.zoo.net import Net

from cipm_ir.passes import PassResult
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]


class Edited:
    """A model of the zoo whose weights are changed in place, by node and number of the input."""

    def __init__(self, name: str | Net) -> None:
        self.name = name if isinstance(name, str) else ""
        self.model = zoo.build(name) if isinstance(name, str) else name.model()
        self.tensors = {t.name: t for t in self.model.graph.initializer}

    def nodes(self, *ops: str) -> list[onnx.NodeProto]:
        return [n for n in self.model.graph.node if n.op_type in ops]

    def change(self, name: str, edit: Callable[[Array], Any]) -> Edited:
        array = numpy_helper.to_array(self.tensors[name]).copy()
        edit(array)
        self.tensors[name].CopyFrom(numpy_helper.from_array(array, name))
        return self

    def silence(self, name: str, units: Any, axis: int = 0, value: float = 0.0) -> Edited:
        """Set the slices at ``units`` along an axis."""
        return self.change(name, lambda a: np.moveaxis(a, axis, 0).__setitem__(units, value))

    def no_producer(self, node: onnx.NodeProto, units: Any, axis: int = 0) -> Edited:
        """Zero rows and biases of a Conv or Gemm."""
        self.silence(node.input[1], units, axis)
        return self.silence(node.input[2], units) if len(node.input) > 2 else self

    def feeds(self, seed: int = 0) -> Feeds:
        if self.name:
            return zoo.feeds(self.name, self.model, seed)
        rng = np.random.default_rng(seed)
        shapes = {v.name: [d.dim_value or 2 for d in v.type.tensor_type.shape.dim] for v in self.model.graph.input}
        return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}

    def program(self) -> Program:
        return Program.of(ir.from_proto(self.model))

    def change_of_outputs(self, result: PassResult) -> float:
        """Largest change relative to the largest output, over two runs."""
        worst = 0.0
        made = ir.to_proto(result.program.emit())
        onnx.checker.check_model(made, full_check=True)
        for seed in (0, 1):
            reference = bool(self.name) and zoo.entry(self.name).reference
            before, after = (zoo.run(m, self.feeds(seed), reference=reference) for m in (self.model, made))
            for a, b in zip(before, after, strict=True):
                assert a.shape == b.shape
                worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)))
        return worst
