"""Models at the edge or beyond it: a clear error or a clean opaque is expected, nothing half-changed."""

from __future__ import annotations

from typing import Any

import torch
from tests.torch.torch_zoo_base import floats, register, tokens
from torch import Tensor, nn
from torch.nn import functional as F

POINTS = floats((2, 6), scale=2.0)


class _Hidden(nn.Module):
    """Two Linear layers between which a subclass does something odd."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 5)

    def odd(self, x: Tensor) -> Any:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.odd(self.fc1(x)))


@register("bad_control_flow", "extra", "bad", "no_export", inputs=POINTS, symbolic=False)
class ControlFlow(_Hidden):
    """A branch on the values of a tensor."""

    def odd(self, x: Tensor) -> Any:
        if x.sum() > 0:
            return torch.relu(x)
        return torch.tanh(x)


@register("bad_data_size", "extra", "bad", "no_export", inputs=POINTS, symbolic=False)
class DataSize(_Hidden):
    """A size read from the data."""

    def odd(self, x: Tensor) -> Any:
        chosen = x[x > 0]
        return x + chosen.mean() * len(chosen.tolist())


class DoublePositive(torch.autograd.Function):
    """2·max(x, 0) with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0) * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * (x > 0) * 2


@register("bad_autograd_function", "extra", "bad", inputs=POINTS)
class CustomFunction(_Hidden):
    """A custom autograd function between free units."""

    def odd(self, x: Tensor) -> Any:
        return DoublePositive.apply(x)  # type: ignore[no-untyped-call]


@register("bad_numpy", "extra", "bad", "no_export", inputs=POINTS, symbolic=False)
class ThroughNumpy(_Hidden):
    """Values that leave torch and come back."""

    def odd(self, x: Tensor) -> Any:
        return torch.from_numpy(x.detach().numpy().clip(-1.0, 1.0))


@register("bad_sort", "extra", "bad", inputs=POINTS)
class Sorted(_Hidden):
    """Units sorted by value: no entry in any table is true of their places."""

    def odd(self, x: Tensor) -> Any:
        values, _ = torch.sort(x, dim=-1)
        return values + torch.topk(x, 1, dim=-1).values


@register("complex_parameters", "extra", "bad", "complex", inputs=floats((2, 7, 6)))
class ComplexFilter(nn.Module):
    """A learned filter in the frequency domain: complex parameters between real layers (GFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 5)
        self.filter = nn.Parameter(torch.randn(4, 12, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft(torch.relu(self.fc1(x)), dim=1) * self.filter
        return self.fc2(torch.fft.irfft(spectrum, n=7, dim=1))


@register("complex_linear", "extra", "bad", "complex", inputs=POINTS)
class ComplexLinear(nn.Module):
    """A Linear with complex weights; its magnitude goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10, dtype=torch.complex64), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc2(self.fc1(x.to(torch.complex64)).abs())


@register("sparse_adjacency", "extra", "bad", "sparse", inputs=floats((7, 6)))
class SparseAdjacency(nn.Module):
    """A graph network whose adjacency is a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 5)
        ring = torch.stack([torch.arange(7), (torch.arange(7) + 1) % 7])
        matrix = torch.sparse_coo_tensor(ring, torch.rand(7) + 0.5, (7, 7), check_invariants=True)
        self.register_buffer("adjacency", matrix.coalesce())

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(torch.sparse.mm(self.adjacency, self.fc1(x)))
        return self.fc2(torch.sparse.mm(self.adjacency, x))


@register("quantized_weight", "extra", "bad", "quantized", "no_export", inputs=POINTS)
class QuantizedWeight(_Hidden):
    """A Linear whose weight is a quantized buffer, made real when it is used."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.quantize_per_tensor(torch.randn(12, 12), 0.02, 0, torch.qint8))

    def odd(self, x: Tensor) -> Any:
        return torch.relu(F.linear(torch.relu(x), self.weight.dequantize()))


@register("bad_training_branch", "extra", "bad", inputs=POINTS)
class TrainingBranch(_Hidden):
    """Another function in training than in eval mode: what was traced in one mode is wrong in the other."""

    def odd(self, x: Tensor) -> Any:
        if self.training:
            return torch.relu(x) + 0.1 * torch.randn_like(x)
        return torch.relu(x)


@register("bad_unused", "extra", "bad", inputs=tokens(37, 7))
class Unused(nn.Module):
    """Parameters, a module and a result that nothing reads; a frozen embedding; a buffer counted up in forward."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 10).requires_grad_(False)
        self.unused = nn.Linear(10, 3)
        self.orphan_bias = nn.Parameter(torch.zeros(4))
        self.fc1, self.fc2 = nn.Linear(10, 13), nn.Linear(13, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, ids: Tensor) -> Any:
        self.calls.add_(1)
        x = self.embedding(ids)
        self.fc1(x).sigmoid()
        return self.fc2(F.relu(self.fc1(x)))
