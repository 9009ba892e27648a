"""Runs the IR of a lowered torch program in onnxruntime beside the program itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from cipm_ir.frontends.torch.load import load_torch
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.session import Runner

Array = npt.NDArray[Any]


def feeds_of(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Array]:
    """Arrays by input name; tensors in the order in which a call holds them."""
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    assert len(flat) == len(capture.inputs)
    return {name: x.detach().numpy() for name, x in zip(capture.inputs, flat, strict=True)}


def tensors_of(output: Any) -> list[Array]:
    """All tensors of a structure (a ModelOutput, a cache), as arrays."""
    return [x.detach().numpy() for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]


def run_both(capture: Capture, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Array, Array]]:
    """Outputs of torch and of the IR in onnxruntime, pairwise."""
    with torch.no_grad():
        wanted = tensors_of(call(*args, **kwargs))
    with Runner(capture.model) as runner:
        got = list(runner.run(feeds_of(capture, args, kwargs)).values())
    return list(zip(wanted, got, strict=True))


def largest_difference(pairs: list[tuple[Array, Array]]) -> float:
    """The largest |a - b| over the largest |a|, over all outputs."""
    worst = 0.0
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        if a.size:
            scale = max(float(np.abs(a.astype(np.float64)).max()), 1e-30)
            worst = max(worst, float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) / scale)
    return worst


def lowering_error(module: Any, *args: Any, method: str = "auto", **kwargs: Any) -> tuple[Capture, float]:
    """Lower a module and compare the IR with it on the given inputs."""
    capture = load_torch(module, args, kwargs, method=method)
    return capture, largest_difference(run_both(capture, module, args, kwargs))
