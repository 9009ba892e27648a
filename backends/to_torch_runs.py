"""Runs of two torch programs side by side, on inputs of our own, compared channel by channel beside their rounding.

What two programs may differ by is measured on the first: every float number that goes in, weights included, is moved by
about a unit in the last place, a few times. An output channel may differ by a few times of what that moves it by. So a
small channel beside large ones is seen, and a saturated or badly conditioned one is not blamed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["computes_otherwise", "first_line", "in_mode", "inputs_like", "tensors_of"]

DRAWS, TIMES, ULPS = 4, 8.0, 4.0
"""So many measurements of the rounding; allowed are so many times of the largest, and so many units in the last place."""

_MAGNITUDES = (1.0, 1e-3, 1e3)

Tensors = list[torch.Tensor]
Call = Callable[[Any, Sequence[torch.Tensor]], Any]
"""Runs a module on the tensors among its inputs."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


def inputs_like(example: Sequence[torch.Tensor]) -> Iterator[Tensors]:
    """Yield the example, then inputs of its shapes and types that nobody chose for it.

    Zeros; ones; random floats of several magnitudes, with integers from among those of the example.
    """
    yield [x.clone() for x in example]
    yield [torch.zeros_like(x) for x in example]
    yield [torch.ones_like(x) for x in example]
    for seed, magnitude in enumerate(_MAGNITUDES):
        generator = torch.Generator().manual_seed(seed)
        yield [_drawn(x, magnitude, generator) for x in example]


def _drawn(x: torch.Tensor, magnitude: float, generator: torch.Generator) -> torch.Tensor:
    if x.is_floating_point() or x.is_complex():
        return (magnitude * torch.randn(x.shape, generator=generator)).to(x.dtype).to(x.device)
    order = torch.randperm(x.numel(), generator=generator).to(x.device)
    return x.flatten()[order].reshape(x.shape)


def computes_otherwise(
    first: nn.Module, second: nn.Module, calls: tuple[Call, Call], example: Sequence[torch.Tensor], must_run: bool = True
) -> str:
    """Return how the second computes something else than the first, in evaluation mode; empty where it does not.

    An input that the first does not take (an index that it does not have) is left out; the example is one that it does.

    Args:
        first: the program taken as right.
        second: the one to compare.
        calls: how each is run.
        example: the tensors among the caller's example inputs.
        must_run: that the second fails on an input counts as a difference.

    Raises:
        RuntimeError: the first does not run on the example.
    """
    for case, inputs in enumerate(inputs_like(example)):
        try:
            wanted = tensors_of(in_mode(first, False, lambda m: calls[0](m, inputs)))  # noqa: B023
        except Exception as error:  # any operation of torch
            if case == 0:
                raise RuntimeError(first_line(error)) from error
            continue
        try:
            got = tensors_of(in_mode(second, False, lambda m: calls[1](m, inputs)))  # noqa: B023
        except Exception as error:  # the user's forward, with sizes that it was not written for
            if must_run:
                return f"its forward does not run with the new tensors ({first_line(error)})"
            continue
        why = _apart(wanted, got, lambda: _rounding(first, calls[0], inputs))  # noqa: B023
        if why:
            return why
    return ""


def _apart(wanted: Tensors, got: Tensors, rounding: Callable[[], list[Tensors]]) -> str:
    if len(got) != len(wanted):
        return f"its forward has {len(got)} outputs, the program {len(wanted)}"
    for k, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {k} of its forward is {b.dtype} {list(b.shape)}, not {a.dtype} {list(a.shape)}"
    unequal = [k for k, (a, b) in enumerate(zip(wanted, got, strict=True)) if not _equal(a, b)]
    moved = rounding() if unequal else []
    for k in unequal:
        if not _within(wanted[k], got[k], [one[k] for one in moved if len(one) == len(wanted)]):
            return f"output {k} of its forward is something else with the new tensors"
    return ""


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point() or a.is_complex():
        return bool(torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))
    return torch.equal(a, b)


def _within(a: torch.Tensor, b: torch.Tensor, moved: Tensors) -> bool:
    """Whether no channel (along the last axis, and along axis 1) differs by more than its rounding explains."""
    if not (a.is_floating_point() or a.is_complex()):
        return False
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return False
    step, wide = torch.finfo(a.dtype).eps, _wide(a)
    apart = (wide - _wide(b)).abs()
    noise = torch.zeros_like(apart)
    for one in moved:
        if one.shape == a.shape:
            noise = torch.maximum(noise, (wide - _wide(one)).abs())
    for axis in {a.ndim - 1, min(1, a.ndim - 1)}:
        over = [k for k in range(a.ndim) if k != axis]
        largest = [x.amax(over) if over else x for x in (apart, noise, wide.abs())]
        if bool((largest[0] > TIMES * largest[1] + ULPS * step * largest[2]).any()):
            return False
    return True


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64).nan_to_num(0.0, 0.0, 0.0)


def _rounding(module: nn.Module, call: Call, inputs: Sequence[torch.Tensor]) -> list[Tensors]:
    """What a program computes with every float number moved by up to a unit in the last place."""
    found = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(module)
        with torch.no_grad():
            for x in (*other.parameters(), *other.buffers()):
                x.copy_(_nudged(x, generator))
        try:
            near = [_nudged(x, generator) for x in inputs]
            found.append(tensors_of(in_mode(other, False, lambda m: call(m, near))))  # noqa: B023
        except Exception:  # noqa: S112  # a moved number may be one that the program refuses
            continue
    return found


def _nudged(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        return x
    up = (torch.rand(x.shape, generator=generator) * 2 - 1).to(x.device)
    return (x.detach() * (1 + torch.finfo(x.dtype).eps * up.to(torch.float64))).to(x.dtype)


def in_mode(module: nn.Module, training: bool, call: Callable[[Any], Any]) -> Any:
    """Call in evaluation or training mode, random numbers the same each time; everything gets its own state back."""
    # A layer that trains inside a model that does not is meant so.
    modes = {m: m.training for m in module.modules()} if module.training or training else {}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    try:
        for m in modes:
            m.training = training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return call(module)
    finally:
        for m, mode in modes.items():
            m.training = mode
        for name, b in module.named_buffers():
            if not torch.equal(b, buffers[name]):
                b.copy_(buffers[name])


def tensors_of(output: Any) -> Tensors:
    """The tensors of a structure, in order."""
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
