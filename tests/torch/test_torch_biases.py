"""A layer without a bias gets one where a pass moves constants into it, and keeps its class where that is proven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cipm_ir

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import Tensor, nn  # noqa: E402

Layer = Callable[..., nn.Module]


class Net(nn.Module):
    """Four units of the first layer are constant, and the layer behind it has no bias."""

    def __init__(self, first: nn.Module, second: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = first, second, last
        with torch.no_grad():
            first.weight[:4] = 0  # type: ignore[operator]
            first.bias[:4] = torch.tensor([1.0, 2.0, -1.0, 0.5])  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return made


class Unbiased(nn.Linear):
    """Says that it has no bias, and would not use one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight)


class Functional(Net):
    """Uses the weight of the second layer alone."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.b.weight  # type: ignore[assignment]
        made: Tensor = self.c(torch.relu(nn.functional.linear(torch.relu(self.a(x)), weight)))
        return made


def linear() -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(6, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 4, bias=False)
    return Net(*layers), torch.randn(5, 6)


def convolution() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 8, 3, bias=False), nn.Conv2d(8, 4, 1, bias=False)
    return Net(*layers), torch.randn(2, 6, 5, 5)


def one_dimension() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv1d(6, 16, 3), nn.Conv1d(16, 8, 1, bias=False), nn.Conv1d(8, 4, 1)
    return Net(*layers), torch.randn(2, 6, 9)


def own_class() -> tuple[nn.Module, Tensor]:
    return Net(nn.Linear(6, 16), Unbiased(16, 8), nn.Linear(8, 4)), torch.randn(5, 6)


def optimized(make: Callable[[], tuple[nn.Module, Tensor]], passes: str, method: str) -> tuple[cipm_ir.Result, Tensor]:
    torch.manual_seed(0)
    module, x = make()
    result = cipm_ir.optimize(cipm_ir.load(module.eval(), (x,), method=method), passes)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), module(x), rtol=1e-4, atol=1e-5)
    return result, x


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("passes", ["remove-dead", "absorb-bias"])
@pytest.mark.parametrize("make", [linear, convolution, one_dimension])
def test_keeps_its_class(make: Callable[[], tuple[nn.Module, Tensor]], passes: str, method: str) -> None:
    result, _ = optimized(make, passes, method)
    assert result.emitted is not None
    assert (result.emitted.form, result.emitted.proof, type(result.model)) == ("module", "same graph", Net)
    assert result.model.b.bias.requires_grad
    assert result.model.b.bias.abs().max() > 0


def functional() -> tuple[nn.Module, Tensor]:
    return Functional(nn.Linear(6, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 4)), torch.randn(5, 6)


@pytest.mark.parametrize("make", [own_class, functional])
def test_is_a_graph_where_the_class_does_not_use_a_bias(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    """The bias is set and the copy read again, which shows another program."""
    result, _ = optimized(make, "remove-dead", "auto")
    assert result.emitted is not None
    assert result.emitted.form == "graph"
    assert "for which its forward has no place" in result.emitted.reason


def test_a_plan_gives_the_bias_too(tmp_path: Path) -> None:
    result, x = optimized(linear, "remove-dead", "auto")
    result.save(tmp_path / "plan")
    fresh, _ = linear()
    again = cipm_ir.apply_plan(fresh.eval(), tmp_path / "plan")
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in result.model.named_parameters()]


def test_copies_of_layers_are_deep() -> None:
    """What a layer holds besides its parameters is its copy's own, and a forward that was put onto it is the copy's."""
    from types import MethodType

    from cipm_ir.backends.torch.state import with_tensors

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.marks[0]  # type: ignore[index]

    layer = nn.Linear(3, 3)
    layer.marks, layer.table, layer.forward = [2.0], torch.ones(3), MethodType(forward, layer)  # type: ignore[assignment]
    layer.register_forward_hook(lambda module, args, out: out + 1)
    net = nn.Sequential(layer, nn.ReLU())
    twin: Any = with_tensors(net, {})
    x = torch.randn(2, 3)
    assert torch.equal(twin(x), net(x))
    inner: Any = twin[0]
    inner.marks[0] = 0.0
    assert torch.equal(twin(x), torch.ones(2, 3)) and layer.marks == [2.0]
    assert inner.table is not layer.table and inner.forward.__self__ is inner
    assert not {id(p) for p in net.parameters()} & {id(p) for p in twin.parameters()}
