"""Index of the torch test models: `CASES`, `case(name)`, `names(*tags)`."""

from __future__ import annotations

from tests import (
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
from tests.torch_zoo_base import CASES, TorchCase, output_tensors

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

__all__ = ["CASES", "FAMILIES", "TorchCase", "case", "names", "output_tensors"]


def case(name: str) -> TorchCase:
    """The case of that name; KeyError names those that are close."""
    if name not in CASES:
        close = [other for other in CASES if name.split("_")[0] in other]
        raise KeyError(f"no torch case {name}; there are {', '.join(close or CASES)}")
    return CASES[name]


def names(*tags: str) -> list[str]:
    """The names of all cases that carry every one of `tags`, in the order of registration."""
    return [name for name, one in CASES.items() if one.tags.issuperset(tags)]
