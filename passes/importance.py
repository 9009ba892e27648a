"""How much each hidden unit (head, group) matters: the criteria by which `prune` ranks.

A criterion is an object with `score`; `register_importance` gives it a name for the text form. The one built in needs
no data: the size of all weights that a unit owns, over all tensors that move with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import InputError, OptionError
from cipm_ir.ir.constants import constant_tensor
from cipm_ir.passes.base import Context
from cipm_ir.symmetry.leaves import Leaf, LeafFactor
from cipm_ir.symmetry.program import Program, Space

Scores = npt.NDArray[np.float64]
_STATISTICS = ((3, "running mean"), (4, "running variance"))


@runtime_checkable
class Importance(Protocol):
    """A criterion for `prune`."""

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """One number for each element of the space, not negative; the larger, the rather it stays.

        Under global ranking, scores of different spaces are divided by the mean of their space.
        """


ImportanceFactory = Callable[[str], Importance]
"""Makes a criterion for a norm, "l1" or "l2"; one that knows no norms ignores it."""

_FACTORIES: dict[str, ImportanceFactory] = {}


def register_importance(name: str, factory: ImportanceFactory) -> None:
    """Make a criterion known by a name. Errors: `OptionError` for a name that is taken."""
    if _FACTORIES.get(name, factory) is not factory:
        raise OptionError(f"A criterion named {name!r} exists already; choose another name.")
    _FACTORIES[name] = factory


def make_importance(what: str | Importance, norm: str) -> Importance:
    """The criterion of this name, or the one that was given. Errors: `OptionError` for an unknown name."""
    if not isinstance(what, str):
        return what
    if what not in _FACTORIES:
        raise OptionError(f"There is no criterion named {what!r}; there are {', '.join(sorted(_FACTORIES))}.")
    return _FACTORIES[what](norm)


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


register_importance("magnitude", Magnitude)


def class_sums(program: Program, norm: str) -> Scores:
    """Per coupled class: sum of |w| ("l1") or w² ("l2") over its positions in all floating-point parameters."""
    analysis = program.analysis
    total = np.zeros(analysis.classes.count)
    by_name: dict[str, list[Leaf]] = {}
    for leaf in analysis.walk.leaves:
        if leaf.dtype.is_floating_point() and not leaf.filled and not _is_statistic(program, leaf):
            by_name.setdefault(leaf.name, []).append(leaf)
    for name, leaves in by_name.items():
        factors = [f for leaf in leaves for f in leaf.factors if f.active]
        if not factors:
            continue
        sums = _marginals(_array(program, name), factors, norm)
        for f, s in zip(factors, sums, strict=True):
            classes = analysis.classes.of[f.base : f.base + f.size]
            total += np.bincount(classes, weights=s, minlength=len(total))
    return total


def _is_statistic(program: Program, leaf: Leaf) -> bool:
    node, index = leaf.uses[0]
    return program.analysis.walk.nodes[node].op_type == "BatchNormalization" and index in dict(_STATISTICS)


def _array(program: Program, name: str) -> npt.NDArray[Any]:
    value = program.model.graph.initializers.get(name)
    tensor: ir.TensorProtocol | None = None if value is None else value.const_value
    if tensor is None:
        maker = next((n for n in program.model.graph if n.outputs and n.outputs[0].name == name), None)
        tensor = None if maker is None else constant_tensor(maker)
    if tensor is None:
        raise InputError(f"The weight {name!r} has no value in the model.")
    array = np.asarray(tensor.numpy())
    return array if array.dtype.kind == "f" and array.dtype.itemsize >= 4 else array.astype(np.float32)


def _marginals(array: npt.NDArray[Any], factors: list[LeafFactor], norm: str) -> list[Scores]:
    """For each factor, the sums of |w| or w² over all other axes, flat."""
    with np.errstate(over="ignore"):  # masks hold -inf or nearly; no unit owns them
        size = np.abs(array) if norm == "l1" else np.square(array)
    labelled = sorted({a for f in factors for a in f.axes})
    rest = [a for a in range(size.ndim) if a not in labelled]
    if rest:  # kernel taps first, once for all factors
        size = _summed(size, rest)
    place = {a: k for k, a in enumerate(labelled)}
    return [_marginal(size, f, place) for f in factors]


def _summed(size: npt.NDArray[Any], axes: list[int]) -> npt.NDArray[Any]:
    """Sum over some axes: of last and first ones by a product with ones, several times faster than a sum in float64."""
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
