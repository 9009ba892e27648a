"""Entries of the zoo: a name, a builder and what is known about the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import onnx
from tests.zoo.net import Net

Builder = Callable[[], onnx.ModelProto]


class UnavailableError(RuntimeError):
    """A model of the zoo needs data or a package that is not here; the message says which."""


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    `expected_units`: free classes in spaces of kind "units", exactly (classes of kind "blocks", such as heads, are
    not counted); None where the design leaves the number open. `at_least`: a lower bound that holds in any case.
    `ranges`: for integer inputs, the exclusive upper bound of the values. `dims`: sizes for symbolic
    dimensions other than the usual (batch 2, sequence 5). `note`: what the numbers rest on, or how large the model is.
    """

    name: str
    builder: Builder = field(repr=False)
    expected_units: int | None
    at_least: int = 0
    tags: frozenset[str] = frozenset()
    ranges: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    dims: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    note: str = ""

    @property
    def reference(self) -> bool:
        """Whether only ONNX's reference evaluator has the kernels."""
        return "reference" in self.tags


_ENTRIES: dict[str, Entry] = {}


def register(
    name: str,
    builder: Builder,
    units: int | None,
    *tags: str,
    at_least: int | None = None,
    ranges: Mapping[str, int] | None = None,
    dims: Mapping[str, int] | None = None,
    note: str = "",
) -> None:
    """Add a model; ValueError when the name is taken."""
    if name in _ENTRIES:
        raise ValueError(f"the zoo already has a model named {name}")
    bound = at_least if at_least is not None else (units or 0)
    _ENTRIES[name] = Entry(name, builder, units, bound, frozenset(tags), ranges or {}, dims or {}, note)


def synthetic(
    units: int | None,
    *tags: str,
    name: str | None = None,
    at_least: int | None = None,
    opset: int = 20,
    dtype: str = "float32",
    ranges: Mapping[str, int] | None = None,
    dims: Mapping[str, int] | None = None,
    note: str = "",
) -> Callable[[Callable[[Net], None]], Callable[[Net], None]]:
    """Register a function that writes one small model into a fresh `Net` (seeded by the name)."""

    def decorate(write: Callable[[Net], None]) -> Callable[[Net], None]:
        key = name or write.__name__

        def build() -> onnx.ModelProto:
            net = Net(key, opset=opset, dtype=dtype)
            write(net)
            return net.model()

        bound = {"at_least": at_least, "ranges": ranges, "dims": dims, "note": note}
        register(key, build, units, "synthetic", *tags, **bound)  # type: ignore[arg-type]
        return write

    return decorate


def entries() -> Mapping[str, Entry]:
    """All entries by name, in the order of registration."""
    return MappingProxyType(_ENTRIES)
