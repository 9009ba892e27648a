"""Training and evaluation mode of torch modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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
