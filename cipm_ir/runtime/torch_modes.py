"""Torch modules that are run or read: in evaluation mode, and left as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(source: Any) -> Iterator[None]:
    """Put a module that trains into evaluation mode; every module gets its own mode back.

    In a model that does not train, a layer that does is meant to.
    """
    trains = isinstance(source, nn.Module) and source.training
    modes = {m: m.training for m in source.modules()} if trains else {}
    try:
        for m in modes:
            m.training = False
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextlib.contextmanager
def unchanged(source: Any) -> Iterator[None]:
    """Give a module back what running its code changes, which may count calls or keep results."""
    modules = list(source.modules()) if isinstance(source, nn.Module) else []
    held = [[(d, dict(d)) for d in (vars(m), m._parameters, m._buffers, m._modules)] for m in modules]
    buffers = [(b, b.detach().clone()) for b in (source.buffers() if modules else ()) if not b.is_meta]
    try:
        yield
    finally:
        for own, before in (pair for pairs in held for pair in pairs):
            if own.keys() != before.keys() or list(map(id, own.values())) != list(map(id, before.values())):
                own.clear()
                own.update(before)
        with torch.no_grad():
            for buffer, old in buffers:
                if buffer.layout == torch.strided and not torch.equal(buffer, old):
                    buffer.copy_(old)
