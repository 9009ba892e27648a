"""The lowering table: one entry per operation serves its module class, function, method and aten overload.

An entry is a function ``entry(b, *arguments)`` that adds ONNX nodes through the `Lowering` ``b`` and returns the
result: a `Tensor`, a `Number`, a tuple of such, or one of its own arguments where the operation changes nothing. It is
found by the bare name of the operation (``conv2d`` for `torch.nn.functional.conv2d`, ``torch.conv2d`` and
``aten.conv2d.default``); where aten orders its arguments in another way, a second entry is named ``aten.<name>``.

A module class names the entry that it calls: its first arguments come from the call, the others are the attributes of
the module with the names of the entry's parameters (``weight``, ``stride``, ``eps``); its tensors arrive as `Tensor`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

from cipm_ir.errors import UnsupportedPattern

Lower = Callable[..., Any]
AnyLower = TypeVar("AnyLower", bound=Lower)

FAMILIES = (
    "elementwise",
    "arithmetic",
    "contraction",
    "convolution",
    "pooling",
    "padding",
    "resampling",
    "normalization",
    "reduction",
    "shaping",
    "indexing",
    "scattering",
    "creation",
    "attention",
    "recurrent",
    "sizes",
    "fourier",
)

_FUNCTIONS: dict[str, Entry] = {}
_MODULES: dict[type[nn.Module], ModuleEntry] = {}


@dataclass(frozen=True)
class Entry:
    """How one operation is lowered."""

    name: str
    lower: Lower
    signature: inspect.Signature
    view: bool = False
    """The result may share memory with the first argument."""


@dataclass(frozen=True)
class ModuleEntry:
    """A module class: the entry that it calls, with how many of the entry's arguments come from the call."""

    entry: Entry
    inputs: int
    fixed: dict[str, Any]
    attributes: tuple[str, ...]
    """Arguments of the entry that do not come from the call."""


def lowers(
    *names: str, modules: tuple[type[nn.Module], ...] = (), inputs: int = 1, view: bool = True, **fixed: Any
) -> Callable[[AnyLower], AnyLower]:
    """Register an entry for operations; registering a name or a class twice is an error.

    Args:
        names: bare names of functions, methods and aten operations (in-place forms too: without the trailing ``_``).
        modules: module classes that compute this; see the head of this file.
        inputs: how many arguments a module gets from its call.
        view: the result may share memory with the first argument; see `computes` for results that never do.
        fixed: arguments of the entry that a module does not have as attributes.
    """

    def register(lower: AnyLower) -> AnyLower:
        entry = Entry(names[0] if names else lower.__name__, lower, _signature(lower), view)
        for name in names:
            if name in _FUNCTIONS:
                raise ValueError(f"torch operation {name!r} is registered twice")
            _FUNCTIONS[name] = entry
        for cls in modules:
            module(cls, inputs=inputs, **fixed)(lower, entry)
        return lower

    return register


computes = functools.partial(lowers, view=False)
"""As `lowers`, for operations whose results have memory of their own."""


def module(cls: type[nn.Module], inputs: int = 1, **fixed: Any) -> Callable[..., Lower]:
    """Register a module class for an entry; registering it twice is an error."""

    def register(lower: Lower, entry: Entry | None = None) -> Lower:
        if cls in _MODULES:
            raise ValueError(f"module class {cls.__name__} is registered twice")
        found = entry or Entry(cls.__name__, lower, _signature(lower))
        _MODULES[cls] = ModuleEntry(found, inputs, fixed, tuple(found.signature.parameters)[inputs:])
        return lower

    return register


def _signature(lower: Lower) -> inspect.Signature:
    signature = inspect.signature(lower)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def load_table() -> None:
    """Import the families."""
    for family in FAMILIES:
        importlib.import_module(f"cipm_ir.frontends.torch.ops.{family}")


def entry_names() -> list[str]:
    """Return names of all operations that are known."""
    load_table()
    return sorted(_FUNCTIONS)


def module_entry(kind: type[nn.Module]) -> ModuleEntry | None:
    """Return the entry of exactly this class: a subclass may compute something else."""
    return _MODULES.get(kind)


def function_entry(target: Any) -> Entry | None:
    """Return the entry of a function, a method's name, or an aten overload."""
    name, aten = bare_name(target)
    return (_FUNCTIONS.get("aten." + name) if aten else None) or _FUNCTIONS.get(name)


def bare_name(target: Any) -> tuple[str, bool]:
    """Return the name of an operation without the in-place underscore, and whether it is an aten overload."""
    if isinstance(target, torch._ops.OpOverload):
        return _overload_name(target)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if getattr(target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS:
        return _IN_PLACE_OPERATORS[name], False
    return _functional(name), False


@cache  # asking a schema takes as long as adding a node
def _overload_name(target: torch._ops.OpOverload) -> tuple[str, bool]:
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten":
        return f"{namespace}.{name}", False
    return _functional(name), True


@cache
def _overload_writes(target: torch._ops.OpOverload) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an aten overload changes."""
    # Running statistics are lowered as in evaluation; detach_ changes what torch knows of a tensor, not its entries.
    if "batch_norm" in target._schema.name or target._schema.name == "aten::detach_":
        return ()
    arguments = enumerate(target._schema.arguments)
    return tuple((k, a.name) for k, a in arguments if a.alias_info is not None and a.alias_info.is_write)


_IN_PLACE_OPERATORS = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "ifloordiv": "floordiv", "imod": "mod",
    "ipow": "pow", "imatmul": "matmul", "iand": "and_", "ior": "or_", "ixor": "xor",
}  # fmt: skip


def _functional(name: str) -> str:
    if name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_"):
        return name[:-1]
    return name


def written(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments that a function or method changes.

    Its first one in place, or what it is given as ``out``.
    """
    if isinstance(target, torch._ops.OpOverload):
        found = [args[k] if k < len(args) else kwargs.get(name) for k, name in _overload_writes(target)]
    else:
        found = [kwargs.get("out"), *(args[:1] if _in_place(target, kwargs) else ())]
    return [x for one in found for x in (one if isinstance(one, tuple | list) else [one]) if x is not None]


def _in_place(target: Any, kwargs: Mapping[str, Any]) -> bool:
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if kwargs.get("inplace") is True or name == "__setitem__":
        return True
    if getattr(target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS or name in ("setitem", "delitem")
    return name.endswith("_") and not name.endswith("__")


def bind(entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Arguments of an entry; refused where the operation is called with something that the entry does not know."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("inplace", "out") or v not in (False, True, None)}
    try:
        return entry.signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedPattern(f"it is called in a way that is not known ({error})") from error
