"""Index of the torch test models: `CASES`, `case(name)`, `names(*tags)`; what `built` and `program` give is shared."""

from __future__ import annotations

import functools
from typing import Any

from tests.torch import (
    torch_zoo_attention,
    torch_zoo_bad,
    torch_zoo_cnn,
    torch_zoo_failures,
    torch_zoo_hf,
    torch_zoo_layers,
    torch_zoo_mlp,
    torch_zoo_sequence,
    torch_zoo_shared,
    torch_zoo_vision,
)
from tests.torch.torch_zoo_base import CASES, TorchCase, output_tensors

import cipm_ir
from cipm_ir.symmetry.program import Program

FAMILIES = (
    torch_zoo_mlp,
    torch_zoo_cnn,
    torch_zoo_vision,
    torch_zoo_sequence,
    torch_zoo_hf,
    torch_zoo_failures,
    torch_zoo_shared,
    torch_zoo_attention,
    torch_zoo_layers,
    torch_zoo_bad,
)
"""The modules that register the cases."""

__all__ = ["CASES", "FAMILIES", "TorchCase", "built", "case", "names", "output_tensors", "program"]


def case(name: str) -> TorchCase:
    """The case of that name; KeyError names those that are close."""
    if name not in CASES:
        close = [other for other in CASES if name.split("_")[0] in other]
        raise KeyError(f"no torch case {name}; there are {', '.join(close or CASES)}")
    return CASES[name]


def names(*tags: str) -> list[str]:
    """The names of all cases that carry every one of `tags`, in the order of registration."""
    return [name for name, one in CASES.items() if one.tags.issuperset(tags)]


@functools.cache
def built(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The module and its inputs, built once for all tests of a process; nothing may change them."""
    found = case(name)
    return found.build(), *found.inputs()


@functools.cache
def program(name: str) -> Program:
    """The module as a program, read once for all tests of a process."""
    module, args, kwargs = built(name)
    return cipm_ir.load(module, args, kwargs)
