"""What a torch test model is, and how one is registered: a class or builder with seeded weights and small inputs.

Fresh networks hide mistakes: a batch norm with statistics 0 and 1, a bias of zeros or a layer scale of 1e-6 commutes
with nearly everything. `randomize` gives every parameter and every running statistic values that differ per unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

Inputs = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
Builder = TypeVar("Builder", bound=Callable[[], nn.Module])
SEED = 1234
BATCH = 2


@dataclass(frozen=True)
class TorchCase:
    """A small torch model: `build()` gives it seeded and in eval mode, `inputs()` its arguments (args, kwargs).

    `symbolic` says that `torch.fx.symbolic_trace` accepts it and that the traced graph computes the same.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    tags: frozenset[str]
    symbolic: bool


CASES: dict[str, TorchCase] = {}


def register(name: str, *tags: str, inputs: Inputs, symbolic: bool = True) -> Callable[[Builder], Builder]:
    """Enter a module class without arguments, or a builder, into the zoo; all its parameters are drawn anew."""
    return _register(name, tags, inputs, symbolic, redraw=True)


def register_as_built(name: str, *tags: str, inputs: Inputs, symbolic: bool = True) -> Callable[[Builder], Builder]:
    """The same for a model whose values are meant as they are (trained, or with constraints between them)."""
    return _register(name, tags, inputs, symbolic, redraw=False)


def _register(
    name: str, tags: tuple[str, ...], inputs: Inputs, symbolic: bool, redraw: bool
) -> Callable[[Builder], Builder]:
    def enter(builder: Builder) -> Builder:
        if name in CASES:
            raise ValueError(f"two torch cases are named {name}")

        def build() -> nn.Module:
            return seeded(builder, redraw)

        CASES[name] = TorchCase(name, build, inputs, frozenset(tags), symbolic)
        return builder

    return enter


def seeded(builder: Callable[[], nn.Module], redraw: bool = True) -> nn.Module:
    """The model of `builder`, the same in every call, in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = builder()
        if redraw:
            randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw every real parameter and running statistic of `model` from the global generator, none of them 0 or 1."""
    for module in model.modules():
        if isinstance(module, ParametrizationList):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.copy_(_fresh(module, name, parameter))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.3 * torch.randn(buffer.shape))
            elif name == "running_var":
                buffer.copy_(0.5 + torch.rand(buffer.shape))


def _fresh(module: nn.Module, name: str, old: Tensor) -> Tensor:
    """New values for a parameter, of a size that keeps activations of order one and attention far from uniform."""
    shape = old.shape
    if isinstance(module, nn.PReLU):
        return 0.1 + 0.3 * torch.rand(shape)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return torch.randn(shape)
    if name.endswith("weight") and "Norm" in type(module).__name__:
        return 0.5 + torch.rand(shape)
    if old.dim() < 2 and ("bias" in name or "beta" in name):
        return (0.1 + 0.3 * torch.rand(shape)) * torch.randn(shape).sign()
    if old.dim() < 2:
        return 0.5 + torch.rand(shape)
    if old.dim() == 3 and shape[0] == 1 and not isinstance(module, nn.modules.conv._ConvNd):
        return 0.5 * torch.randn(shape)  # class tokens and tables of positions
    inputs = old.numel() / shape[0]
    return torch.randn(shape) * float(1.2 / inputs**0.5)


def floats(*shapes: Sequence[int], scale: float = 1.0) -> Inputs:
    """One normal tensor of every shape, with that standard deviation."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(SEED + 1)
        return tuple(scale * torch.randn(tuple(shape), generator=generator) for shape in shapes), {}

    return make


def images(channels: int, height: int, width: int | None = None) -> Inputs:
    """A batch of images, square where no width is given."""
    return floats((BATCH, channels, height, width or height))


def tokens(vocabulary: int, length: int) -> Inputs:
    """A batch of token numbers in [0, vocabulary)."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(SEED + 1)
        return (torch.randint(0, vocabulary, (BATCH, length), generator=generator),), {}

    return make


def output_tensors(result: Any) -> list[Tensor]:
    """All tensors in what a model returned, in order: tuples, mappings, HF outputs and key-value caches are opened."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in output_tensors(value)]
    if isinstance(result, tuple | list):
        return [tensor for value in result for tensor in output_tensors(value)]
    if hasattr(result, "layers"):  # a key-value cache of transformers
        return [tensor for layer in result.layers for tensor in (layer.keys, layer.values)]
    return []
