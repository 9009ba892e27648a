"""Arguments of a forward: named like builtins, by keyword only, in another order, any number of them, with defaults."""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

import cipm_ir

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402

from cipm_ir.backends.torch.arguments import part_arguments  # noqa: E402
from cipm_ir.backends.torch.emit import emit_graph  # noqa: E402


class Base(nn.Module):
    """16 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def net(self, x: Any) -> Any:
        return self.b(torch.relu(self.a(x)))


def module(arguments: str, computed: str) -> Any:
    """A module whose forward takes these arguments and gives ``net`` of what is computed of them."""
    names: dict[str, Any] = {"Base": Base, "torch": torch}
    exec(f"class Net(Base):\n    def forward(self, {arguments}):\n        return self.net({computed})", names)
    torch.manual_seed(0)
    return names["Net"]().eval()


GENERATOR = torch.Generator().manual_seed(0)
X, Y, Z = (torch.randn(3, 6, generator=GENERATOR) for _ in range(3))
FORMS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    **{name: (f"{name}, other", f"{name} - other", (X, Y), {}) for name in (
        "max", "sum", "type", "id", "filter", "range", "len", "float", "next", "slice", "getattr", "device", "inf",
        "torch", "nan", "NoneType", "fx_pytree", "pytree", "math", "operator", "fx",
    )},
    "keyword only": ("x, *, max", "x * max", (X,), {"max": Y}),
    "all by keyword": ("*, x, filter", "x * filter", (), {"x": X, "filter": Y}),
    "keyword only with a default": ("x, *, scale=2.0", "x * scale", (X,), {}),
    "keywords in another order": ("x, y, z", "x - y * z", (), {"z": Z, "y": Y, "x": X}),
    "some keywords in another order": ("x, *, sum, min", "x - sum * min", (X,), {"min": Y, "sum": Z}),
    "torch by keyword": ("x, *, torch", "x * torch", (X,), {"torch": Y}),
    "torch with a default": ("x, torch=2.0", "x * torch", (X,), {}),
    "torch in a dictionary": ("x, **torch", "x - torch['torch'] * torch['inf']", (X,), {"torch": Y, "inf": Z}),
    "torch for all positions": ("*torch", "torch[0] - torch[1]", (X, Y), {}),
    "many that hide names": ("torch, device, inf", "torch - device * inf", (X, Y, Z), {}),
    "keywords as a dictionary": ("x, **kw", "x - kw['type'] * kw['id']", (X,), {"id": Y, "type": Z}),
    "all positions": ("*xs", "xs[0] - xs[1]", (X, Y), {}),
    "all positions, named input": ("*input", "input[0] - input[1]", (X, Y), {}),
    "further positions": ("x, *rest", "x - rest[0] * rest[1]", (X, Y, Z), {}),
    "no further positions": ("x, *rest", "x", (X,), {}),
    "a default": ("x, id=None, type=None", "x if type is None else x * type", (X,), {"type": Y}),
    "position only": ("max, /, id", "max - id", (X, Y), {}),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_arguments(form: str) -> None:
    arguments, computed, args, kwargs = FORMS[form]
    net = module(arguments, computed)
    program = cipm_ir.load(net, args, kwargs)
    assert sum(space.size for space in program.spaces if space.kind == "units") == 16
    result = cipm_ir.optimize(program, "canonicalize")
    assert result.emitted is not None and program.origin is not None
    assert (result.emitted.form, result.emitted.proof) == ("module", "same graph")
    graph = emit_graph(program.origin.capture, program.emit())  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = net(*args, **kwargs)
        for made in (result.model, graph):
            torch.testing.assert_close(made(*args, **kwargs), wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(made(*args, **dict(reversed(kwargs.items()))), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["torch", "device", "pytree", "fx_pytree"])
def test_code_that_calls_what_an_argument_hides(name: str) -> None:
    """The graph calls functions of that name; it is exported too (a tree of arguments), read again and copied."""
    net = calling(name)
    for args, kwargs in (((X,), {}), ((), {name: X})):
        program = cipm_ir.load(net, args, kwargs)
        graph = emit_graph(program.origin.capture, program.emit())  # type: ignore[union-attr]
        second = cipm_ir.load(graph, args, kwargs)
        again = emit_graph(second.origin.capture, second.emit())  # type: ignore[union-attr]
        with torch.no_grad():
            for made in (graph, copy.deepcopy(graph), again):
                torch.testing.assert_close(made(*args, **kwargs), net(*args, **kwargs), rtol=1e-5, atol=1e-6)


def calling(name: str) -> Any:
    """A module that asks for sizes and makes numbers, whose only argument has this name."""
    code = f"""
class Net(Base):
    def forward(self, {name}):
        x = {name}
        return th.sigmoid(self.net(x.view(x.shape[0], 6))) + th.zeros(x.shape[0], 4, device=x.device)
"""
    names: dict[str, Any] = {"Base": Base, "th": torch}
    exec(code, names)
    torch.manual_seed(0)
    return names["Net"]().eval()


def test_builtins_that_the_graph_calls() -> None:
    def built() -> Any:
        graph = torch.fx.Graph()
        first, second = graph.placeholder("len"), graph.placeholder("divmod", default_value=2)
        count = graph.call_function(len, (first,))
        graph.output((graph.call_function(operator.mul, (count, second)), first))
        return graph

    with pytest.raises(TypeError):
        torch.fx.GraphModule(nn.Module(), built())(X)
    graph = built()
    part_arguments(graph)
    made = torch.fx.GraphModule(nn.Module(), graph)
    assert made(X)[0] == 6 and made(divmod=5, len=X)[0] == 15 and made(X, 4)[1] is X


def test_fx_itself_fails_there() -> None:
    """The control: without names of its own for arguments, the code that fx writes does not run."""
    graph = torch.fx.symbolic_trace(module("torch", "torch"))
    with pytest.raises((AttributeError, TypeError)):
        graph(X)


@pytest.mark.parametrize("name", ["torch", "self", "device", "inf", "math", "operator", "getattr", "len"])
def test_inputs_of_an_onnx_model(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", [name, "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Shape", [name], ["s"]),
        helper.make_node("ConstantOfShape", ["s"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["zero"], keepdims=0),
        helper.make_node("Add", ["r", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(v, 1, ["N", d]) for v, d in ((name, 6), ("y", 4))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = cipm_ir.to_torch(cipm_ir.load(proto))
    torch.testing.assert_close(made(X), torch.relu(X @ torch.tensor(weight)))
    if name != "self":  # torch's own call has that name
        torch.testing.assert_close(made(**{name: X}), made(X))
