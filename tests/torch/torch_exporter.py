"""Exports to ONNX for the tests: what torch's exporter makes anew at every call is made once."""

from __future__ import annotations

import functools
import io
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch


def read_operators_once() -> None:
    """Let all exports of this process share one list of onnxscript's operators.

    The exporter parses the source of some 500 functions to make it: more than half the time of a small export. The list
    is only read. A version of torch that asks for it elsewhere exports as ever, slower.
    """
    try:
        from torch.onnx._internal.exporter import _registration
    except ImportError:
        return
    source: Any = getattr(_registration, "onnxscript_apis", None)
    listing = getattr(source, "get_torchlib_ops", None)
    if listing is not None and not hasattr(listing, "cache_info"):
        source.get_torchlib_ops = functools.cache(listing)


def exported(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, **options: Any) -> Any:
    """What `torch.onnx.export` gives for a module in evaluation mode, without what it prints and warns of."""
    read_operators_once()
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(module.eval(), args, kwargs=kwargs, dynamo=True, verbose=False, **options)


def drawn(module: Any) -> Any:
    """The module, its weights drawn anew so that no two are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module
