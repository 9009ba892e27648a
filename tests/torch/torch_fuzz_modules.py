"""Random torch modules: lists of (kind, seed) steps, each of which builds its layers for the shape that it meets.

A module is its list of steps, so that a failing one shrinks by leaving steps out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tests.torch.torch_fuzz_blocks import MORE_STEPS
from tests.torch.torch_fuzz_steps import STEPS, Place
from torch import nn

Step = tuple[str, int]
ALL = {**STEPS, **MORE_STEPS}
STARTS = ("vector", "sequence", "image")
SIZES = (6, 8, 12)


class Fuzzed(nn.Module):
    """Runs its steps one after the other; ``dynamic``: no step writes the size of the batch as a literal."""

    def __init__(self, start: str, steps: Sequence[Step], seed: int, dynamic: bool = False) -> None:
        super().__init__()
        self.start, self.functions, self.kinds = start, list[Callable[..., Any]](), list[Step]()
        rng = np.random.default_rng(seed)
        self.several = bool(rng.integers(5) == 0)
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        try:
            self._build(steps, rng, dynamic)
        finally:
            torch.random.set_rng_state(state)
        self.eval()

    def _build(self, steps: Sequence[Step], rng: np.random.Generator, dynamic: bool) -> None:
        x = self.example()
        width = int(rng.choice(SIZES))
        self.first: nn.Module = nn.Conv2d(4, width, 1) if self.start == "image" else nn.Linear(4, width)
        x = self.first(x)
        kept = [x]
        for number, (kind, own) in enumerate(steps):
            place = Place(self, f"s{number}", np.random.default_rng(own), tuple(x.shape), dynamic, kept)
            function = ALL[kind](place)
            if function is None:
                continue
            try:
                made = function(self, x.clone(), [k.clone() for k in kept])
            except (RuntimeError, ValueError, IndexError):
                place.forget()
                continue
            if not 2 <= made.ndim <= 4 or made.shape[0] != 2 or made.numel() > 4000 or not made.isfinite().all():
                place.forget()
                continue
            x = made.detach()
            kept = [*kept[-3:], x]
            self.functions.append(function)
            self.kinds.append((kind, own))
        size = x.shape[1] if x.ndim == 4 else x.shape[-1]
        self.last: nn.Module = nn.Conv2d(size, 3, 1) if x.ndim == 4 else nn.Linear(size, 3)
        with torch.no_grad():
            for name, tensor in (*self.named_parameters(), *self.named_buffers()):
                if tensor.is_floating_point():
                    noise = 0.3 * torch.randn(tensor.shape)
                    tensor.copy_(noise.abs() + 0.5 if "var" in name else noise + (0.8 if tensor.ndim == 1 else 0))

    def example(self, batch: int = 2, seed: int = 0) -> torch.Tensor:
        """An input."""
        shape = {"vector": (batch, 4), "sequence": (batch, 5, 4), "image": (batch, 4, 3, 3)}[self.start]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        kept = [x]
        for function in self.functions:
            x = function(self, x, kept)
            kept = [*kept[-3:], x]
        made = self.last(x)
        return (made, {"early": made * 2}) if self.several else made


def random_steps(seed: int, least: int = 2, most: int = 6) -> tuple[str, list[Step]]:
    """Where to start, and steps."""
    rng = np.random.default_rng(seed)
    names = sorted(ALL)
    count = int(rng.integers(least, most + 1))
    mixing = ("project", "activation")
    steps = []
    for _ in range(count):
        kind = str(rng.choice(mixing)) if rng.random() < 0.3 else str(rng.choice(names))
        steps.append((kind, int(rng.integers(1 << 30))))
    return STARTS[int(rng.integers(3))], steps


def fuzzed(seed: int, dynamic: bool = False) -> Fuzzed:
    """The module of a seed."""
    start, steps = random_steps(seed)
    return Fuzzed(start, steps, seed, dynamic)
