"""The pass `absorb-bias`: large constants are moved from a bias through a Relu into the biases of what reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.passes.exact.absorb_bias.sites import Place, find_places
from cipm_ir.passes.exact.canonicalize.members import Floats
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import idle, left_alone
from cipm_ir.passes.framework.registry import register
from cipm_ir.runtime.activations.observe import observe
from cipm_ir.runtime.intervals.bounds import along, find_intervals
from cipm_ir.symmetry.program import Program

_ROWS = 1 << 14
"""Values per unit from which a quantile is taken, at most."""


@register("absorb-bias")
@dataclass(frozen=True)
class AbsorbBias(Pass):
    """Move constants through Relu: if z >= c, then relu(z) = relu(z - c) + c, and c can move into the next biases.

    Activations then have a smaller range, which helps quantization (Nagel et al. 2019, section 4.1.3, where c comes
    from batch-norm statistics). By default c is the largest value that bounds prove for all inputs: exact. With
    ``observed``, c is the smallest value on the data, or the quantile ``quantile`` of each unit: approximate. Where z <
    c, a unit comes out too large by c - relu(z), at most c; the report says how often this happens on the data, and by
    how much.

    Handles Relu, LeakyRelu, PRelu and Clip from 0 behind Conv, ConvTranspose, Gemm, BatchNormalization or an Add.
    Left alone: units that anything but products with weights consumes (a residual sum), zero-padded convolutions (the
    constant is not constant at their border), and a bias that is shared, computed or missing.

    Raises:
        OptionError: ``observed`` without data, or a quantile without ``observed``.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    keeps_units: ClassVar[bool] = True

    observed: bool = option(False, "use the smallest values seen on the data as bounds (approximate)")
    quantile: float = option(0.0, "with observed: the fraction of values that may be cut off", low=0.0, high=0.5)

    @property
    def approximates(self) -> bool:
        """With what is seen on data."""
        return self.observed

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Bound, and move space by space."""
        if self.observed and ctx.data is None:
            raise OptionError("Pass 'absorb-bias': observed looks at data, but none was given; pass data=.")
        if self.quantile and not self.observed:
            raise OptionError("Pass 'absorb-bias': a quantile is taken on data; set observed=true, or leave it out.")
        ctx.progress("bounds", None)
        places, refused = find_places(program)
        constants = proven(program, places)
        approximate = False
        if self.observed:
            names = {place.space: program.spaces[place.space] for place in places}
            hidden = {k: why for k, space in names.items() if (why := program.unseen(space))}
            refused |= {names[k].name: why for k, why in hidden.items() if not constants[names[k].name].any()}
            places = [place for place in places if place.space not in hidden]
        if self.observed and places:
            seen = _observed(program, places, self.quantile, ctx)
            larger = {name: np.maximum(constants[name], c) for name, c in seen.items()}
            approximate = any((larger[name] > constants[name]).any() for name in larger)
            constants = larger
        moved = _Moved(program)
        for name, c in constants.items():
            if c.any():
                try:
                    moved.move(name, c)
                except SymmetryError as refusal:
                    refused[name] = str(refusal)
        cut = _cut(program, places, moved.constants, ctx) if approximate and self.quantile else _Cut()
        return moved.result(refused, cut, Kind.APPROXIMATE if approximate else None, len(places))


def proven(program: Program, places: list[Place]) -> dict[str, Floats]:
    """By the name of a space, (units,) the largest c >= 0 that holds for all inputs, rounding included."""
    found = find_intervals(program.model, program.analysis)
    out = {}
    for place in places:
        bounds = found.values.get(place.before)
        low = np.full(program.analysis.classes.count, -np.inf)
        if bounds is not None:
            low[:] = np.inf
            for f in program.analysis.walk.states[place.before].factors:
                np.minimum.at(low, program.analysis.classes.of[f.labels].ravel(), along(bounds, f)[0].ravel())
        out[program.spaces[place.space].name] = _constant(low[_classes(program, place)])
    return out


def _constant(low: Floats) -> Floats:
    return np.asarray(np.where(np.isfinite(low), np.maximum(low, 0.0), 0.0), np.float64)


def _classes(program: Program, place: Place) -> np.ndarray:
    return program.analysis.spaces[place.space].table[:, 0]


# ---------------------------------------------------------------- data
def _units(program: Program, place: Place, array: np.ndarray) -> Floats:
    """(rows, units): the value before a Relu; of a unit with several places, the smallest of them."""
    classes = _classes(program, place)
    state = program.analysis.walk.states[place.before]
    columns = []
    for f in state.factors:
        label = program.analysis.classes.of[f.labels].ravel()
        moved = np.moveaxis(array, f.axes, range(-len(f.axes), 0)).reshape(-1, len(label))
        order = np.argsort(label, kind="stable")
        start = np.searchsorted(label[order], classes)
        stop = np.searchsorted(label[order], classes, side="right")
        if (stop > start).all():
            width = int((stop - start).min())
            columns.append(moved[:, order[start[:, None] + np.arange(width)]].min(axis=2))
    return np.asarray(np.minimum.reduce(columns), np.float64)


def _observed(program: Program, places: list[Place], quantile: float, ctx: Context) -> dict[str, Floats]:
    """By the name of a space, what each unit exceeds on the data, but for a fraction ``quantile`` of the values."""
    assert ctx.data is not None
    names = sorted({p.before for p in places})
    least = {p.space: np.full(len(_classes(program, p)), np.inf) for p in places}
    kept: dict[int, list[Floats]] = {p.space: [] for p in places}
    for _, values in observe(program.model, names, ctx.data, progress=ctx.progress):
        for p in places:
            rows = _units(program, p, values[p.before])
            least[p.space] = np.minimum(least[p.space], rows.min(axis=0, initial=np.inf))
            if quantile:
                kept[p.space] = _thinned([*kept[p.space], rows])
    name_of = {p.space: program.spaces[p.space].name for p in places}
    if not quantile:
        return {name_of[k]: _constant(low) for k, low in least.items()}
    return {name_of[k]: _constant(np.quantile(np.concatenate(rows), quantile, axis=0)) for k, rows in kept.items()}


def _thinned(parts: list[Floats]) -> list[Floats]:
    """Every second row is left out as long as there are too many."""
    while sum(len(p) for p in parts) > _ROWS:
        parts = [np.concatenate(parts)[::2]]
    return parts


@dataclass(frozen=True)
class _Cut:
    """What a quantile cuts off: the share of values, and by how much the worst is too large."""

    share: float = 0.0
    worst: float = 0.0


def _cut(program: Program, places: list[Place], constants: dict[str, Floats], ctx: Context) -> _Cut:
    assert ctx.data is not None
    mine = [p for p in places if program.spaces[p.space].name in constants]
    below, total, worst = 0, 0, 0.0
    if not mine:
        return _Cut()
    for _, values in observe(program.model, sorted({p.before for p in mine}), ctx.data, progress=ctx.progress):
        for p in mine:
            c = constants[program.spaces[p.space].name]
            rows = _units(program, p, values[p.before])[:, c > 0]
            excess = np.maximum(c[c > 0] - np.maximum(rows, 0.0), 0.0)
            below, total = below + int((excess > 0).sum()), total + excess.size
            worst = max(worst, float(excess.max(initial=0.0)))
    return _Cut(below / max(total, 1), worst)


# ---------------------------------------------------------------- moving
@dataclass
class _Moved:
    """The program so far, and the constants that were moved, by the name of the space."""

    first: Program
    program: Program = field(init=False)
    constants: dict[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.program = self.first

    def move(self, name: str, c: Floats) -> None:
        """Take c from the bias of one space, and give it to the readers.

        Raises:
            SymmetryError: a reader cannot take it; nothing is changed then.
        """
        places, refused = find_places(self.program)
        place = next((p for p in places if self.program.spaces[p.space].name == name), None)
        if place is None or len(place.positions) != len(c):
            raise SymmetryError(refused.get(name, f"@{name} is not found again"))
        value = self.program.model.graph.initializers[place.bias].const_value
        assert value is not None
        old = np.asarray(value.numpy())
        flat = old.astype(np.float64).ravel().copy()
        flat[place.positions] -= c[:, None]
        new = flat.reshape(old.shape).astype(old.dtype)
        # what the bias really lost, in its own type, is what the readers get
        lost = (old.astype(np.float64) - new.astype(np.float64)).ravel()[place.positions].min(axis=1)
        lowered = self.program.refit({place.bias: new})
        size = len(c)
        self.program = lowered.absorb(lowered.space(name), np.arange(size), np.eye(size, dtype=np.uint8), lost)
        self.constants[name] = lost

    def result(self, refused: dict[str, str], cut: _Cut, kind: Kind | None, behind: int) -> PassResult:
        """Summary, witness and numbers; ``behind``: how many spaces have a Relu from which constants could move."""
        units = sum(int((c > 0).sum()) for c in self.constants.values())
        largest = max((float(c.max()) for c in self.constants.values()), default=0.0)
        metrics = {"units": units, "spaces": len(self.constants), "largest": largest, "refused": refused}
        metrics["behind"] = behind
        metrics |= {"cut": cut.share, "cut_worst": cut.worst, "bound": largest if kind else 0.0}
        stay = left_alone(refused)
        if not units:
            why = stay or ("" if metrics["behind"] else idle(self.first, "no Relu behind a bias feeds a space alone"))
            summary = "; ".join(x for x in ("no constant to move", why) if x)
            return PassResult(self.first, False, summary, metrics=metrics)
        summary = f"constants of {units} units in {len(self.constants)} spaces moved on, the largest {largest:.3g}"
        if kind is not None:
            summary += f"; {100 * cut.share:.2g}% of the values on the data are cut off, by at most {cut.worst:.3g}"
        summary += f"; {stay}" if stay else ""
        witness = {"shift": {name: c.tolist() for name, c in self.constants.items()}}
        return PassResult(self.program, True, summary, witness, metrics, kind)
