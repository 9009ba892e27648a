"""Programs that an earlier version got wrong: each a small module, acted on and made smaller."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.frontends.torch import table as table  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402


class Hidden(nn.Module):
    """Two layers with something in between."""

    def __init__(self, middle: Any, *, out: int = 8) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(6, 8), nn.Linear(out, 3), middle
        self.table = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Any:
        return self.last(self.middle(self, self.first(x).relu()))


def write_through_a_view(module: Hidden, h: Tensor) -> Any:
    h[..., 2:4].mul_(3.0)
    return h


def write_that_turns_axes(module: Hidden, h: Tensor) -> Any:
    turned = h * 2
    turned.transpose_(0, 1)
    return turned.transpose(0, 1) + h * 2


def read_behind_a_write(module: Hidden, h: Tensor) -> Any:
    y = h.contiguous() * 2
    y.flatten(1).tanh_()
    return y


def part_of_a_table(module: Hidden, h: Tensor) -> Any:
    return h + module.table[: h.size(-1)]


def rounded_up(module: Hidden, h: Tensor) -> Any:
    half = -(-h.size(-1) // 2)
    return torch.cat([h[..., half:], h[..., :half]], -1)


def divided_by_the_size(module: Hidden, h: Tensor) -> Any:
    return h / h.size(-1) ** 0.5


def truth_times_truth(module: Hidden, h: Tensor) -> Any:
    mask = (h.sum(-1, True) > 0) * (h.mean(-1, True) < 3)
    return h * mask


def result_into_another(module: Hidden, h: Tensor) -> Any:
    made = h.detach().new_empty(2, 5, 8)
    torch.add(h.detach(), h.detach(), out=made)
    return made


def empty_part(module: Hidden, h: Tensor) -> Any:
    return torch.cat([h[..., :8], h[..., 8:]], -1)


MIDDLES = (
    write_through_a_view,
    write_that_turns_axes,
    read_behind_a_write,
    part_of_a_table,
    rounded_up,
    divided_by_the_size,
    truth_times_truth,
    empty_part,
    result_into_another,
)


def loaded(middle: Any, method: str) -> tuple[Hidden, Tensor, Program]:
    torch.manual_seed(0)
    module, x = Hidden(middle).eval(), torch.randn(2, 5, 6)
    return module, x, cipm_ir.load(module, (x,), method=method)


def run(program: Program, x: Tensor) -> Tensor:
    emit: Any = program.origin.emit  # type: ignore[union-attr]
    with torch.no_grad():
        made: Tensor = emit(program.emit()).object(x)
    return made


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("middle", MIDDLES, ids=lambda f: f.__name__)
def test_a_random_element(middle: Any, method: str) -> None:
    module, x, program = loaded(middle, method)
    rng = np.random.default_rng(1)
    other = program.act({space: space.random(rng) for space in program.spaces})
    with torch.no_grad():
        wanted = module(x)
    assert torch.allclose(run(other, x), wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("middle", [part_of_a_table, divided_by_the_size, empty_part], ids=lambda f: f.__name__)
def test_units_that_contribute_nothing(middle: Any, method: str) -> None:
    """Without what reads them, four units can go: the size that is used as a number stays what it was."""
    _, x, program = loaded(middle, method)
    weight = program.emit().graph.initializers["last.weight"].const_value
    assert weight is not None
    zeroed = np.array(weight.numpy())
    zeroed[:, 4:] = 0
    dead = program.refit({"last.weight": zeroed})
    small = dead.restrict({dead.space("first"): np.arange(4)})
    assert torch.allclose(run(small, x), run(dead, x), atol=1e-5)


def test_control_a_size_that_follows_is_seen() -> None:
    """The emitted program divides by the old size; by the new one it would be another function."""
    _, x, program = loaded(divided_by_the_size, "symbolic")
    small = program.restrict({program.space("first"): np.arange(4)})
    emitted: Any = program.origin.emit(small.emit()).object  # type: ignore[union-attr]
    with torch.no_grad():
        h = F.relu(emitted.first(x))
        assert torch.allclose(emitted(x), emitted.last(h / 8**0.5), atol=1e-5)
        assert not torch.allclose(emitted(x), emitted.last(h / 4**0.5), atol=1e-3)


class Normalized(nn.Module):
    """Batch norm between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.bn.running_var = torch.rand(8) + 0.5

    def forward(self, x: Tensor) -> Any:
        return self.conv2(self.bn(self.conv1(x)).relu())


def test_a_layer_that_trains_in_a_model_that_does_not() -> None:
    module, x = Normalized().eval(), torch.randn(4, 3, 8, 8)
    module.bn.train()
    program = cipm_ir.load(module, (x,))
    result = cipm_ir.optimize(program, ["fold-batch-norm"], verify=False)
    assert not result.report.steps[0].changed
    rng = np.random.default_rng(1)
    other = program.act({space: space.random(rng) for space in program.spaces})
    emitted: Any = program.origin.emit(other.emit()).object  # type: ignore[union-attr]
    assert emitted.bn.training and not emitted.training
    with torch.no_grad():
        assert torch.allclose(emitted(x), module(x), atol=1e-5)


class Cached(nn.Module):
    """A buffer written through a view, and read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("cache", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Any:
        self.cache[:2].copy_(self.first(x).relu())  # type: ignore[index]
        return self.last(self.cache)


def test_a_buffer_written_through_a_view() -> None:
    module, x = Cached().eval().requires_grad_(False), torch.randn(2, 6)
    graph = torch.export.export(module, (x,)).module()
    for source in (module, graph):
        program = cipm_ir.load(source, (x,))
        rng = np.random.default_rng(1)
        other = program.act({space: space.random(rng) for space in program.spaces})
        compare: Any = program.origin.compare  # type: ignore[union-attr]
        assert compare(program.emit(), other.emit()).ok


def test_constants_are_no_units() -> None:
    """A mask of ones that the program makes for itself has nothing that could be pruned."""
    module = Hidden(lambda m, h: h * torch.ones(5, 1) * torch.ones(8)).eval()
    program = cipm_ir.load(module, (torch.randn(2, 5, 6),))
    assert [space.size for space in program.spaces] == [8]


def test_what_has_memory_of_its_own_is_no_view_in_torch() -> None:
    """An entry that claims fresh results must not be one whose aten form returns a view."""
    table.load_table()
    wrong = []
    for name in table.entry_names():
        entry = table._FUNCTIONS[name]
        packet = getattr(torch.ops.aten, name.removeprefix("aten."), None)
        if entry.view or packet is None:
            continue
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        returns = [r.alias_info for schema in schemas for r in schema.returns]
        if any(alias is not None and not alias.is_write for alias in returns):
            wrong.append(name)
    assert wrong == ["as_tensor", "diagonal"], "as_tensor makes a tensor of numbers here, diagonal is refused"
