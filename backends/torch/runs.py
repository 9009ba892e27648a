"""Torch programs run on inputs of our own, and compared channel by channel with what their rounding allows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import nn
from torch.utils import _pytree as pytree

from cipm_ir.backends.torch.state import as_torch
from cipm_ir.errors import CipmError, InputError
from cipm_ir.runtime.inputs.generate import Feeds
from cipm_ir.runtime.torch_modes import evaluating, unchanged
from cipm_ir.runtime.verification.compare import Array, Case, Outputs, Reference, compare
from cipm_ir.runtime.verification.noise import DRAWS, MORE_DRAWS, by_channel, difference, nudged

__all__ = [
    "Side",
    "Watched",
    "as_array",
    "cases_like",
    "computes_otherwise",
    "first_line",
    "in_mode",
    "inputs_like",
    "near",
]

_KERNELS, _SATURATED = 8.0, 1e-6
_MAGNITUDES = {"random": 1.0, "random / 1000": 1e-3, "random x 1000": 1e3}

Tensors: TypeAlias = list[torch.Tensor]


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


# ---------------------------------------------------------------- inputs
def inputs_like(example: Sequence[torch.Tensor], seed: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Yield the example, then inputs of its shapes and types that were generated, each with what it is.

    Zeros; ones; random floats of several magnitudes, with integers from among those of the example. Masks keep their
    entries: where one masks everything, what comes out is up to the kernel.
    """
    yield "example", [x.clone() for x in example]
    for name, fill in (("zeros", 0), ("ones", 1)):
        yield name, [x.clone() if x.dtype == torch.bool else torch.full_like(x, fill) for x in example]
    for k, (name, magnitude) in enumerate(_MAGNITUDES.items()):
        generator = torch.Generator().manual_seed(1000 * seed + k)
        yield name, [_drawn(x, magnitude, generator) for x in example]


def _drawn(x: torch.Tensor, magnitude: float, generator: torch.Generator) -> torch.Tensor:
    if x.is_floating_point() or x.is_complex():
        return (magnitude * torch.randn(x.shape, generator=generator)).to(x.dtype).to(x.device)
    order = torch.randperm(x.numel(), generator=generator).to(x.device)
    return x.flatten()[order].reshape(x.shape)


# ---------------------------------------------------------------- runs
@dataclass(frozen=True)
class Watched:
    """What a program returns, and tensors from inside of it by name."""

    result: Any
    inside: Mapping[str, torch.Tensor]


@dataclass
class Side:
    """A torch program that runs in several ways which differ by nothing but rounding.

    Attributes:
        module: runs in evaluation mode, without gradients.
        call: runs it on tensors, in the order of ``names``; may return `Watched`.
        names: of its inputs.
    """

    module: nn.Module
    call: Callable[[Any, Tensors], Any]
    names: Sequence[str]
    seed: int = 0
    backend: str = "torch"

    def others(self) -> Sequence[str]:
        """Return the names of all ways to run but the plain one."""
        return ["other kernels", *(f"draw {k}" for k in range(DRAWS))]

    def more(self) -> Sequence[str]:
        """Return further names, for cases of doubt."""
        return [f"draw {k}" for k in range(DRAWS, DRAWS + MORE_DRAWS)]

    def outputs(self, feeds: Sequence[Feeds], way: str = "") -> Iterator[Outputs]:
        """Run on each of several inputs; in a draw every weight and input is moved by about a unit in the last place.

        Raises:
            InputError: it does not run.
        """
        if not way.startswith("draw "):
            with _without_onednn() if way == "other kernels" else contextlib.nullcontext():
                yield from map(self.run, feeds)
            return
        rng = np.random.default_rng((self.seed, int(way.removeprefix("draw "))))
        other = copy.deepcopy(self.module)
        with torch.no_grad():
            for x in (*other.parameters(), *other.buffers()):
                if x.is_floating_point():
                    x.copy_(as_torch(ir.tensor(nudged(as_array(x), rng))))
        moved = Side(other, self.call, self.names)
        for one in feeds:
            yield moved.run({name: nudged(x, rng) for name, x in one.items()})

    def run(self, feeds: Feeds) -> Outputs:
        """Return the outputs by position ("output 0"), as arrays, and watched tensors by their names.

        Raises:
            InputError: it does not run.
        """
        held = next((x for x in (*self.module.parameters(), *self.module.buffers())), None)
        device = torch.device("cpu") if held is None else held.device
        tensors = [as_torch(ir.tensor(feeds[name])).to(device) for name in self.names]
        try:
            made = in_mode(self.module, lambda m: self.call(m, tensors))
        except Exception as error:  # any operation of torch, or the user's code
            raise InputError(f"torch cannot run the program: {first_line(error)}.") from error
        result, inside = (made.result, made.inside) if isinstance(made, Watched) else (made, {})
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        arrays = {f"output {k}": as_array(x) for k, x in enumerate(outputs)}
        return arrays | {name: as_array(x) for name, x in inside.items()}


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Torch's own kernels. The public switch sets TF32 too, and warns where there is none."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def as_array(x: torch.Tensor) -> Array:
    """Return the tensor as an array; types that numpy lacks are those of ml_dtypes."""
    return np.asarray(tensor_adapters.TorchTensor(x.detach().cpu().contiguous()).numpy())


def cases_like(side: Side, example: Sequence[torch.Tensor], few: bool = False) -> list[Case]:
    """Run a program on its example and on inputs of our own; those that it does not take are left out.

    ``few``: on one of our own, of random numbers.

    Raises:
        InputError: it does not run on the example.
    """
    made = []
    for label, tensors in inputs_like(example, side.seed):
        if few and label not in ("example", next(iter(_MAGNITUDES))):
            continue
        feeds = {name: as_array(x) for name, x in zip(side.names, tensors, strict=True)}
        try:
            made.append(Case(label, feeds, side.run(feeds)))
        except InputError:
            if not made:
                raise
    return made


def computes_otherwise(
    first: Side,
    second: Callable[[Feeds], Outputs],
    example: Sequence[torch.Tensor],
    *,
    must_run: bool = True,
    times: float = 1.0,
    same_kernels: bool = True,
    few: bool = False,
) -> str:
    """Return how the second computes something else than the first; empty where it does not.

    Args:
        first: the program taken as right.
        second: runs the other; outputs by position.
        example: the tensors among the caller's example inputs.
        must_run: that the second fails on an input counts as a difference.
        times: how many times as far as the rounding of the first it may be away.
        same_kernels: the second runs in torch too; otherwise see `near`.
        few: on two inputs only.

    Raises:
        InputError: the first does not run on the example.
    """
    kept, actual = [], []
    for case in cases_like(first, example, few):
        try:
            got = second(case.feeds)
        except CipmError as error:
            if must_run:
                return f"it does not run on {case.label} ({first_line(error)})"
            continue
        if len(got) != len(case.outputs):
            return f"it has {len(got)} outputs, the program {len(case.outputs)}"
        kept.append(case)
        actual.append(got)
    reference = Reference(first, kept)
    found = reference.compare(actual)
    if found.ok is not False or found.share <= times or (not same_kernels and near(reference, actual)):
        return ""
    return found.reason


def near(reference: Reference, actual: Sequence[Outputs]) -> bool:
    """Return whether a program in another runtime is near enough to one whose noise was measured.

    Runtimes approximate functions (exp, tanh, sigmoid) in their own ways: to a few units in the last place of the value
    where it is large, and of 1 where it saturates. So a channel may be away by several times its noise, and by a
    millionth of the largest value that it has on any input.
    """
    for name in (name for name in reference.sticks[0] if name in actual[0]):
        sticks = [one[name] for one in reference.sticks]
        for stick, got in zip(sticks, (one[name] for one in actual), strict=True):
            if not stick.scale or got.shape != stick.expected.shape or got.dtype != stick.expected.dtype:
                if compare(stick, got).why:
                    return False
                continue
            error, apart = difference(stick.expected, got)
            if (apart if stick.unstable is None else apart & ~stick.unstable).any():
                return False
            for axis, own in stick.scale.items():
                alike = [s.scale[axis] for s in sticks if axis in s.scale and s.scale[axis].shape == own.shape]
                allowed = _KERNELS * stick.allowed(axis) + _SATURATED * np.max(alike, axis=0)
                if (by_channel(error, axis) > allowed).any():
                    return False
    return True


def in_mode(module: nn.Module, call: Callable[[Any], Any]) -> Any:
    """Call in evaluation mode, random numbers the same each time; everything gets its own state back."""
    # Where there is no accelerator, `torch.manual_seed` notes the seed and the stack of the call for one that may come:
    # milliseconds each time, and the notes are never freed.
    seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    with evaluating(module), unchanged(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        seed(0)
        return call(module)
