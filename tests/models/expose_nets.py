"""Networks for the tests of `expose`, and one way to run it: verified, checked by onnx, compared in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from tests.zoo.net import Net

import cipm_ir.passes.exact.expose.expose  # noqa: F401  (registers the pass)
from cipm_ir.passes.framework.pipeline import run_passes
from cipm_ir.passes.framework.report import Step
from cipm_ir.runtime.inputs.generate import random_inputs
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]


def program(net: Net | onnx.ModelProto) -> Program:
    """Program of a finished net."""
    return Program.of(ir.from_proto(net.model() if isinstance(net, Net) else net))


def expose(before: Program, options: str = "", *, exact: bool = False, tolerance: float = 1e-5) -> tuple[Program, Step]:
    """Run the pass; the result is a valid model and computes the same, bit for bit where ``exact``."""
    outcome = run_passes(before, f"expose{{{options}}}" if options else "expose")
    (step,) = outcome.report.steps
    assert step.checked == ("verified" if step.changed else "unchanged"), step.checked
    after = outcome.program
    check(after)
    worst = difference(before, after)
    assert worst == 0 if exact else worst < tolerance, worst
    return after, step


def check(after: Program) -> None:
    """Valid for onnx, and every name is there once."""
    proto = ir.to_proto(after.emit())
    onnx.checker.check_model(proto, full_check=True)
    outputs = [name for node in proto.graph.node for name in node.output if name]
    given = {one.name for one in (*proto.graph.initializer, *proto.graph.input)}
    assert len(set(outputs)) == len(outputs) and not given & set(outputs)


def difference(a: Program, b: Program) -> float:
    """The largest |a - b| over the largest |a|, over all outputs and two random inputs."""
    worst = 0.0
    for seed in range(2):
        feeds = random_inputs(a.model, np.random.default_rng(seed), 3)
        wanted, got = run(a.emit(), feeds), run(b.emit(), feeds)
        for name, value in wanted.items():
            x, y = value.astype(np.float64), got[name].astype(np.float64)
            worst = max(worst, float(np.abs(x - y).max() / np.abs(x).max()))
    return worst


def operators(made: Program) -> list[str]:
    """Operators in graph order."""
    return [node.op_type for node in made.model.graph]


def array_of(made: Program, name: str) -> Array:
    """A parameter's values."""
    tensor = made.model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def vectors(net: Net, n: int, shape: tuple[int, ...] | None = None) -> tuple[str, str]:
    """Gamma and beta that are far from 1 and 0."""
    gamma = (net.rng.uniform(0.3, 2.0, n) * net.rng.choice([-1.0, 1.0], n)).astype(net.dtype)
    return net.const(gamma.reshape(shape or (n,)), "gamma"), net.const(net.normal(shape or (n,), 0.5), "beta")


def layer_norm(net: Net, x: str, n: int, *, beta: bool = True, **attributes: Any) -> str:
    """LayerNormalization over the last axis."""
    scale, shift = vectors(net, n)
    return net.op("LayerNormalization", x, scale, *([shift] if beta else []), **attributes)


def rms_norm(net: Net, x: str, n: int, form: str) -> str:
    """An RMS normalization over the last axis: the operator, or spelled out as ``form`` says."""
    gamma, _ = vectors(net, n)
    if form == "operator":
        return net.op("RMSNormalization", x, gamma, epsilon=1e-6)
    square = net.op("Mul", x, x) if form == "multiplied" else net.op("Pow", x, net.const(2.0))
    power = net.op("Add", net.op("ReduceMean", square, net.const([-1])), net.const(1e-6))
    if form == "divided":
        normal = net.op("Div", x, net.op("Sqrt", power))
    elif form == "power":
        normal = net.op("Mul", x, net.op("Pow", power, net.const(-0.5)))
    elif form == "one over":
        normal = net.op("Mul", net.op("Div", net.const(1.0), net.op("Sqrt", power)), x)
    else:
        normal = net.op("Mul", x, net.op("Reciprocal", net.op("Sqrt", power)))
    return net.op("Mul", gamma, normal)


def spelled_layer_norm(net: Net, x: str, n: int, axis: int = -1, shape: tuple[int, ...] | None = None) -> str:
    """A layer normalization as exporters wrote it before opset 17."""
    gamma, beta = vectors(net, n, shape)
    axes = net.const([axis]) if net.domains[""] >= 18 else ""
    attributes: dict[str, Any] = {} if axes else {"axes": [axis]}

    def mean(value: str) -> str:
        return net.op("ReduceMean", value, *([axes] if axes else []), **attributes)

    moved = net.op("Sub", x, mean(x))
    power = net.op("Add", mean(net.op("Pow", moved, net.const(2.0))), net.const(1e-5))
    normal = net.op("Div", moved, net.op("Sqrt", power))
    return net.op("Add", net.op("Mul", normal, gamma), beta)


def pre_norm_stack(net: Net, n: int = 12, blocks: int = 2, norm: Any = layer_norm) -> str:
    """An embedded sequence and residual blocks norm, Linear, Gelu, Linear; norm and head give (N, L, 3)."""
    x = net.op(
        "Gather", net.const(net.normal((7, n), 1.0), "table"), net.input("x", ["N", "L"], onnx.TensorProto.INT64)
    )
    for _ in range(blocks):
        hidden = net.op("Gelu", net.linear(norm(net, x, n), n, 2 * n))
        x = net.op("Add", x, net.linear(hidden, 2 * n, n))
    y = net.linear(norm(net, x, n), n, 3)
    net.output(y, ["N", "L", 3])
    return y
