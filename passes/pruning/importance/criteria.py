"""How much each hidden unit (head, group) matters: the criteria by which `prune` ranks.

A criterion is a function of (program, space, context) that gives a number per element, or an object with such a
``score``; `register_importance` gives it a name for the text form. "magnitude", here, needs no data: the size of all
weights that a unit owns, over all tensors that move with it. The others stand in ``importance_*.py``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError, OptionError
from cipm_ir.ir.parameters import stored_tensor
from cipm_ir.passes.framework.base import Context
from cipm_ir.symmetry.leaves import Leaf, LeafFactor
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Scores = npt.NDArray[np.float64]
_STATISTICS = ((3, "running mean"), (4, "running variance"))


@runtime_checkable
class Importance(Protocol):
    """A criterion for `prune`. One that looks at inner values says so by an attribute ``observes = True``."""

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Return one number for each element of the space, not negative; the larger, the rather it stays.

        Under global ranking, scores of different spaces are divided by the mean of their space.
        """


@runtime_checkable
class ScoreFunction(Protocol):
    """The same as one plain function."""

    def __call__(self, program: Program, space: Space, ctx: Context, /) -> Scores:
        """Return one number for each element of the space, not negative; the larger, the rather it stays."""


ImportanceFactory = Callable[[str], Importance]
"""Makes a criterion for a norm, "l1" or "l2"; one that knows no norms ignores it."""

_FAMILIES = ("plain", "gradient", "data")
_REGISTERED: dict[str, tuple[Any, ImportanceFactory]] = {}


def register_importance(name: str, criterion: Importance | ScoreFunction | ImportanceFactory) -> None:
    """Make a criterion known by a name.

    It is a function of (program, space, context), an object with ``score``, or a factory: a class or a function of one
    argument, called once for each run. Take a factory where ``score`` keeps something between spaces.

    Raises:
        OptionError: a name that is taken.
    """
    _load()
    if name in _REGISTERED and _REGISTERED[name][0] is not criterion:
        raise OptionError(f"A criterion named {name!r} exists already; choose another name.")
    _REGISTERED[name] = criterion, _factory(criterion)


def registered_importances() -> tuple[str, ...]:
    """Return the names of all criteria, sorted."""
    _load()
    return tuple(sorted(_REGISTERED))


def _load() -> None:
    """Let the criteria of this package register; they import this module."""
    for family in _FAMILIES:
        importlib.import_module(f"cipm_ir.passes.pruning.importance.{family}")


def make_importance(what: str | Importance | ScoreFunction, norm: str) -> Importance:
    """Return the criterion of this name, or the one that was given.

    Raises:
        OptionError: an unknown name.
    """
    if not isinstance(what, str):
        return _factory(what)(norm)
    _load()
    if what not in _REGISTERED:
        raise OptionError(f"There is no criterion named {what!r}; there are {', '.join(registered_importances())}.")
    return _REGISTERED[what][1](norm)


def _factory(criterion: Any) -> ImportanceFactory:
    if isinstance(criterion, type):
        takes_norm = _takes(criterion, "l2")
        return lambda norm: criterion(norm) if takes_norm else criterion()
    if isinstance(criterion, Importance):
        return lambda _norm: criterion
    if not callable(criterion):
        raise OptionError(f"{criterion!r} is no criterion; give a function of (program, space, context).")
    if _takes(criterion, None, None, None):
        return lambda _norm: _Scored(criterion)
    if not _takes(criterion, None):
        name = getattr(criterion, "__name__", criterion)
        raise OptionError(f"{name!r} is no criterion: it does not take (program, space, context).")
    made: ImportanceFactory = criterion
    return made


def _takes(function: Any, *arguments: Any) -> bool:
    """Return whether a call with these arguments fits the function."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # built in, with no signature to look at
        return True
    return True


@dataclass(frozen=True)
class _Scored:
    """A function as an object."""

    function: ScoreFunction

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Return what the function says."""
        return self.function(program, space, ctx)


class Magnitude:
    """Norm of the group: of every weight that is removed with the unit, in all tensors (Fang et al. 2023, DepGraph).

    "l1" sums absolute values, "l2" is the root of the sum of squares. What normalization measured (running mean and
    variance) is no weight, and integers are left out. Each tensor is read once, sums are in float64.
    """

    def __init__(self, norm: str = "l2") -> None:
        if norm not in ("l1", "l2"):
            raise OptionError(f"There is no norm {norm!r} for the magnitude of a group; use l1 or l2.")
        self.norm = norm
        self._known: tuple[Program, Scores] | None = None

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Norm per element of the space."""
        if self._known is None or self._known[0] is not program:
            self._known = (program, class_sums(program, self.norm))
        table = program.analysis.spaces[program.index(space)].table
        sums = self._known[1][table].sum(axis=1)
        if not np.isfinite(sums).all():
            raise InputError(
                f"A weight that moves with @{space.name} holds NaN or infinity; repair the model before pruning it."
            )
        return np.asarray(np.sqrt(sums) if self.norm == "l2" else sums, np.float64)


_REGISTERED["magnitude"] = Magnitude, _factory(Magnitude)


def class_sums(program: Program, norm: str) -> Scores:
    """Per free class and part: sum of |w| ("l1") or w² ("l2") over its positions in all floating-point parameters.

    Zero for classes that are pinned, as kernel taps are.
    """
    analysis = program.analysis
    classes, free, parts = analysis.classes.of, analysis.classes.free, analysis.classes.parts.of
    total = np.zeros(analysis.classes.count)
    moves = free[classes] if parts is None else free[classes] | (parts >= 0)
    by_name: dict[str, list[Leaf]] = {}
    for leaf in analysis.walk.leaves:
        if leaf.dtype.is_floating_point() and not leaf.filled and not _is_statistic(program, leaf):
            by_name.setdefault(leaf.name, []).append(leaf)
    for name, leaves in by_name.items():
        active = (f for leaf in leaves for f in leaf.factors if f.active)
        factors = [f for f in active if moves[f.base : f.base + f.size].any()]
        if not factors:
            continue
        sums = _marginals(parameter_array(program, name), factors, norm)
        for f, s in zip(factors, sums, strict=True):
            own = classes[f.base : f.base + f.size]
            total += np.bincount(own, weights=np.where(free[own], s, 0.0), minlength=len(total))
            if parts is not None:
                part = parts[f.base : f.base + f.size]
                total += np.bincount(part[part >= 0], weights=s[part >= 0], minlength=len(total))
    return total


def _is_statistic(program: Program, leaf: Leaf) -> bool:
    node, index = leaf.uses[0]
    return program.analysis.walk.nodes[node].op_type == "BatchNormalization" and index in dict(_STATISTICS)


def parameter_array(program: Program, name: str) -> npt.NDArray[Any]:
    """Return the value of a parameter, as floats of 32 bits or more.

    Raises:
        InputError: it has none.
    """
    array = np.asarray(stored_tensor(program.model, name).numpy())
    return array if array.dtype.kind == "f" and array.dtype.itemsize >= 4 else array.astype(np.float32)


def _marginals(array: npt.NDArray[Any], factors: list[LeafFactor], norm: str) -> list[Scores]:
    """For each factor, the sums of |w| or w² over all other axes, flat."""
    with np.errstate(over="ignore"):  # masks hold -inf or nearly; no unit owns them
        size = np.abs(array) if norm == "l1" else np.square(array)
        if norm == "l2" and array.dtype != np.float64 and np.isinf(size).any():
            size = np.square(array.astype(np.float64))
    labelled = sorted({a for f in factors for a in f.axes})
    rest = [a for a in range(size.ndim) if a not in labelled]
    if rest:  # kernel taps first, once for all factors
        size = _summed(size, rest)
    place = {a: k for k, a in enumerate(labelled)}
    return [_marginal(size, f, place) for f in factors]


def _summed(size: npt.NDArray[Any], axes: list[int]) -> npt.NDArray[Any]:
    """Return sum over some axes.

    Of last and first ones by a product with ones, several times faster than a sum in float64.
    """
    if not size.size:  # a layer without units
        return np.asarray(size.sum(axis=tuple(axes), dtype=np.float64))
    left = sorted(axes)
    while left and left[-1] == size.ndim - 1:
        left.pop()
        size = size.reshape(-1, size.shape[-1]).dot(np.ones(size.shape[-1], size.dtype)).reshape(size.shape[:-1])
    while left and left[0] == 0 and size.ndim > 1:
        left = [a - 1 for a in left[1:]]
        size = np.ones(size.shape[0], size.dtype).dot(size.reshape(size.shape[0], -1)).reshape(size.shape[1:])
    return size.sum(axis=tuple(left), dtype=np.float64) if left else size


def _marginal(size: npt.NDArray[Any], f: LeafFactor, place: dict[int, int]) -> Scores:
    kept = [place[a] for a in f.axes]
    total = _summed(size, [k for k in range(size.ndim) if k not in kept])
    if f.groups:  # rows of one group share their columns
        total = total.reshape(f.groups, -1, f.shape[1]).sum(axis=1)
    return np.asarray(total, np.float64).ravel()
