"""Packed sequences have a reason of their own; a batch normalization that trains keeps its units through export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cipm_ir
from cipm_ir.errors import UnsupportedError

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402


class Packed(nn.Module):
    """Packs what it gives a recurrent layer."""

    def __init__(self, layer: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.before, self.layer, self.after, self.last = nn.Linear(6, 12), layer, nn.Linear(8, 4), last

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(self.before(x), lengths, batch_first=True, enforce_sorted=False)
        y, state = self.layer(packed)
        if self.last:
            return self.after(state[-1])
        return self.after(pad_packed_sequence(y, batch_first=True)[0])


class TakesPacked(nn.Module):
    """Is given a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 8, batch_first=True)

    def forward(self, packed: Any) -> Any:
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


class Decides(nn.Module):
    """Cannot be a graph for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(6, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        return self.layer(x)[0] if float(x.sum()) > float(lengths.sum()) else x


X, LENGTHS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 3])
PACKED: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {
    "LSTM": (lambda: Packed(nn.LSTM(12, 8, batch_first=True)), (X, LENGTHS), "auto"),
    "LSTM, export": (lambda: Packed(nn.LSTM(12, 8, batch_first=True)), (X, LENGTHS), "export"),
    "GRU, traced": (lambda: Packed(nn.GRU(12, 8, batch_first=True)), (X, LENGTHS), "symbolic"),
    "RNN, its last state": (lambda: Packed(nn.RNN(12, 8, batch_first=True), last=True), (X, LENGTHS), "auto"),
    "as an input": (TakesPacked, (pack_padded_sequence(X, LENGTHS, batch_first=True),), "auto"),
}


@pytest.mark.parametrize("case", list(PACKED))
def test_a_packed_sequence_is_named(case: str) -> None:
    make, args, method = PACKED[case]
    with pytest.raises(UnsupportedError, match=r"uses pack_padded_sequence.* padded tensor and mask"):
        cipm_ir.load(make().eval(), args, method=method)


def test_another_reason_is_not_called_packed() -> None:
    with pytest.raises(UnsupportedError, match="cannot be made a graph") as raised:
        cipm_ir.load(Decides().eval(), (X, LENGTHS))
    assert "packed" not in str(raised.value)


class Normalized(nn.Module):
    """8 channels through a batch normalization that uses the batch."""

    def __init__(self, *, calls: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.counts = calls

    def forward(self, x: Tensor) -> Any:
        if self.counts:
            self.calls.add_(1)  # type: ignore[operator]
            return self.last(torch.relu(self.norm(self.first(x)))) * self.calls
        return self.last(torch.relu(self.norm(self.first(x))))


def trains() -> Normalized:
    torch.manual_seed(0)
    net = Normalized().eval()
    net.norm.train()
    return net


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_a_batch_normalization_that_trains_keeps_its_channels(method: str) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = cipm_ir.load(trains(), (images,), method=method)
    assert [(space.name.partition(".")[0], space.size) for space in program.spaces] in (
        [("first", 8)],
        [("p_first", 8)],
    )
    result = cipm_ir.optimize(program, "canonicalize")
    assert result.emitted is not None
    assert (result.emitted.form, result.emitted.proof) == ("module", "same graph")
    one, other = trains(), result.model
    with torch.no_grad():
        torch.testing.assert_close(other(images), one(images), rtol=1e-4, atol=1e-5)
    # The running statistics took the batch in, each channel its own: in evaluation the two are the same again.
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), one.eval()(images), rtol=1e-4, atol=1e-5)
    pruned = cipm_ir.optimize(program, "prune{ratio=0.5}").model
    assert pruned.norm.running_mean.shape == (4,)


def test_a_counter_that_is_used_is_not_forgotten() -> None:
    """Control: what the module computes with its counter is part of the program."""
    net = Normalized(calls=True).eval()
    program = cipm_ir.load(net, (torch.randn(4, 3, 8, 8),), method="export")
    assert any("calls" in (value.name or "") for value in program.model.graph.initializers.values())


def test_experts_that_run_one_after_the_other_are_told_the_way() -> None:
    """And the way that is told leads to their units."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.torch.torch_zoo_hf import mixtral_model

    net, tokens = mixtral_model("eager").eval(), torch.arange(6).reshape(1, 6)
    with pytest.raises(UnsupportedError, match=r"call model\.set_experts_implementation\('grouped_mm'\)"):
        cipm_ir.load(net, (tokens,))
    net.model.set_experts_implementation("grouped_mm")  # type: ignore[operator, union-attr]
    sizes = [space.size for space in cipm_ir.load(net, (tokens,)).spaces if "experts" in space.name]
    assert sizes == [20, 20]
