"""Passes by name: the built-in ones, those of the running program, and those that other packages announce."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import TypeVar

from cipm_ir.errors import OptionError
from cipm_ir.passes.framework.base import Pass
from cipm_ir.passes.framework.options import Option, options_of

GROUP = "cipm_ir.passes"
"""The entry-point group by which other packages announce passes: `name = "package.module:Class"`."""

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_.][a-z0-9]+)*")
_PASSES: dict[str, type[Pass]] = {}
_BUILT_IN = {
    "absorb-bias": "exact.absorb_bias.absorb_bias",
    "canonicalize": "exact.canonicalize.canonicalize",
    "canonicalize-signs": "exact.canonicalize.canonicalize_signs",
    "clean-up": "exact.cleanup.clean_up",
    "cluster": "clustering.cluster",
    "compress": "pruning.compress.compress",
    "equalize": "exact.equalize.equalize",
    "expose": "exact.expose.expose",
    "fold": "merging.fold",
    "fold-affine": "exact.affine.fold_affine",
    "fold-batch-norm": "exact.cleanup.clean_up",
    "prune": "pruning.prune",
    "recover-names": "exact.recover_names",
    "remove-dead": "exact.dead.remove_dead",
    "rotate": "exact.rotate.rotate",
}
"""The modules of our own passes, which are imported when one is asked for."""

P = TypeVar("P", bound=type[Pass])


def register(name: str) -> Callable[[P], P]:
    """Class decorator that makes a pass known by a name; put it above ``@dataclass(frozen=True)``.

    Raises:
        OptionError: a name that is taken or not of the form `my-pass`, a class that is no frozen dataclass.
    """

    def decorate(cls: P) -> P:
        _check_class(cls, name)
        if not cls.__module__.startswith("cipm_ir.passes."):
            _import_built_in(name)
        known = _PASSES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise OptionError(
                f"A pass named {name!r} exists already ({known.__module__}.{known.__qualname__}); choose another name."
            )
        cls.name = name
        _PASSES[name] = cls
        return cls

    return decorate


def _check_class(cls: type[Pass], name: str) -> None:
    if not _NAME.fullmatch(name):
        raise OptionError(f"{name!r} is no name for a pass; use lower-case words joined by hyphens.")
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise OptionError(f"The pass {name!r} must be a subclass of cipm_ir.passes.Pass.")
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise OptionError(f"The pass {name!r} must be a dataclass: put @dataclass(frozen=True) under the decorator.")
    missing = [item.name for item in dataclasses.fields(cls) if item.init and item.name == "name"]
    if missing:
        raise OptionError(f"The pass {name!r} has a field called 'name', which is the name of the pass itself.")


def lookup(name: str) -> type[Pass]:
    """Return the class of a pass.

    Raises:
        OptionError: an unknown name, with the names near it.
    """
    _import_built_in(name)
    if name in _PASSES:
        return _PASSES[name]
    announced = _announced()
    if name in announced:
        return _load(announced[name])
    known = sorted({*_BUILT_IN, *_PASSES, *announced})
    near = difflib.get_close_matches(name, known, 3, 0.5)
    own = f"one of your own must be imported, or announced by an installed package (entry-point group {GROUP})"
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}; {own}."
    raise OptionError(f"There is no pass named {name!r}; {hint}")


def names() -> tuple[str, ...]:
    """Return the names of all passes, sorted; those of other packages are not imported."""
    return tuple(sorted({*_BUILT_IN, *_PASSES, *_announced()}))


def _import_built_in(name: str) -> None:
    if name in _BUILT_IN and name not in _PASSES:
        importlib.import_module(f"cipm_ir.passes.{_BUILT_IN[name]}")


@dataclasses.dataclass(frozen=True)
class Listing:
    """One line of the list of passes; ``fault`` says why a pass of another package cannot be used."""

    name: str
    kind: str
    doc: str
    options: tuple[Option, ...]
    package: str
    fault: str = ""


def listing() -> tuple[Listing, ...]:
    """Return all passes with their documentation and options, sorted by name."""
    return tuple(_listed(name) for name in names())


def _listed(name: str) -> Listing:
    try:
        cls = lookup(name)
    except OptionError as error:
        return Listing(name, "", "", (), "", str(error))
    doc = (cls.__doc__ or "").strip().split("\n\n")[0]
    return Listing(name, cls.kind.value, " ".join(doc.split()), options_of(cls), cls.__module__.split(".")[0])


def _announced() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def _load(point: importlib.metadata.EntryPoint) -> type[Pass]:
    """Return the class behind an entry point; a module is imported for what it registers."""
    where = point.dist.name if point.dist is not None else "another package"
    try:
        loaded = point.load()
        if point.name not in _PASSES:
            register(point.name)(loaded)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(
            f"The pass {point.name!r} of {where} ({point.value}) cannot be imported: {type(error).__name__}: {error}."
        ) from error
    return _PASSES[point.name]
