"""What `cluster` reports: numbers before and after for each space and for the network, one line, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cipm_ir.passes.clustering.affinity import Affinities
from cipm_ir.passes.clustering.metrics import (
    bandwidth,
    block_mass,
    effective_dimension,
    equal_blocks,
    modularity,
    starts_of,
)
from cipm_ir.passes.clustering.network import Couplings
from cipm_ir.passes.clustering.order import checked
from cipm_ir.passes.clustering.scales import Arrangement, arrange
from cipm_ir.passes.framework.figures import Bars, Figure, HeatMap, pooled
from cipm_ir.symmetry.space import Space

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
BLOCKS = 4
"""Number of equal blocks whose mass is given beside that of the modules: comparable between methods and models."""

_PAIRS = ("block_mass", "equal_mass", "modularity", "bandwidth")


@dataclass(frozen=True)
class Shown:
    """Everything there is to report on."""

    found: Affinities
    made: Arrangement
    couplings: Couplings

    def each(self) -> Iterator[tuple[Space, Floats, Floats, Labels, Floats]]:
        """Space, affinity before and after, modules along the new order, the signed matrix."""
        for k, space in enumerate(self.found.spaces):
            before, order = checked(self.found.affinity[k]), self.made.orders[k]
            yield space, before, before[np.ix_(order, order)], self.made.modules[k], self.found.signed[k]


def measure_all(shown: Shown) -> dict[str, Any]:
    """Per space and in the mean over units: pairs [before, after], with the same modules laid over both orders."""
    spaces = {}
    for space, before, after, label, signed in shown.each():
        equal = equal_blocks(len(label), BLOCKS)
        spaces[space.name] = {
            "units": len(label),
            "inside": None if space.parent is None else space.parent[0].name,
            "modules": len(np.unique(label)),
            "block_mass": [block_mass(before, label), block_mass(after, label)],
            "equal_mass": [block_mass(before, equal), block_mass(after, equal)],
            "modularity": [modularity(before, label), modularity(after, label)],
            "bandwidth": [bandwidth(before), bandwidth(after)],
            "effective_dimension": effective_dimension(signed),
        }
    units = np.array([entry["units"] for entry in spaces.values()], np.float64)
    made: dict[str, Any] = {
        key: (units @ np.array([entry[key] for entry in spaces.values()]) / units.sum()).tolist() for key in _PAIRS
    }
    if shown.couplings:
        made["weight_mass"] = [_weight_mass(shown, moved=False), _weight_mass(shown, moved=True)]
    return made | {"flat": shown.made.flat, "remarks": shown.made.remarks, "spaces": spaces}


def by_chance(found: Affinities, method: str, resolution: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return what the method makes of the same matrices with their entries shuffled.

    Numbers to hold the real ones against.
    """
    shuffled = []
    for matrix in found.affinity:
        above = np.triu_indices(len(matrix), 1)
        mixed = np.eye(len(matrix))
        mixed[above] = rng.permutation(matrix[above])
        shuffled.append(np.maximum(mixed, mixed.T))
    made = arrange(shuffled, {}, scale="layer", method=method, resolution=resolution)
    control = Affinities(found.by, found.spaces, found.signed, shuffled)
    metrics = measure_all(Shown(control, made, {}))
    return {key: metrics[key][1] for key in _PAIRS}


def _weight_mass(shown: Shown, *, moved: bool) -> float:
    """Part of the weights between two spaces, squared and balanced, that lies in the diagonal of 4 by 4 blocks."""
    held, total = 0.0, 0.0
    for (i, j), bound in shown.couplings.items():
        if moved:
            bound = bound[np.ix_(shown.made.orders[i], shown.made.orders[j])]
        rows, columns = (equal_blocks(n, BLOCKS) for n in bound.shape)
        held += float(bound[rows[:, None] == columns].sum())
        total += float(bound.sum())
    return held / total if total else 0.0


def summary_of(shown: Shown, metrics: Mapping[str, Any], moved: int) -> str:
    """Return one line for people."""
    modules = sum(entry["modules"] for entry in metrics["spaces"].values())
    if shown.made.shared:
        modules = len(np.unique(np.concatenate(shown.made.modules)))
    (before, after), (low, high) = metrics["block_mass"], metrics["modularity"]
    line = (
        f"{moved} of {len(shown.found.spaces)} space{'s' * (len(shown.found.spaces) > 1)} reordered by "
        f"{shown.found.by}, {modules} module{'s' * (modules > 1)}; in them "
        f"{after:.0%} of the affinity (as it came {before:.0%}), modularity {low:.2f} -> {high:.2f}"
    )
    if "chance" in metrics:
        line += f" (shuffled entries {metrics['chance']['modularity']:.2f})"
    if "weight_mass" in metrics:
        line += f", weights near the diagonal {metrics['weight_mass'][0]:.0%} -> {metrics['weight_mass'][1]:.0%}"
    remarks = shown.made.remarks
    more = f" and {len(remarks) - 2} more remarks" if len(remarks) > 2 else ""
    return line + "".join(f"; {remark}" for remark in remarks[:2]) + more


def figures_of(shown: Shown, metrics: Mapping[str, Any]) -> tuple[Figure, ...]:
    """Bars over all spaces, then a heat map per space, wide ones pooled."""
    if not shown.found.spaces:
        return ()
    figures: list[Figure] = list(_bars(metrics["spaces"]))
    for space, before, after, label, _ in shown.each():
        entry = metrics["spaces"][space.name]
        cuts = [start / len(label) for start in starts_of(label)]
        note = (
            f"{entry['modules']} modules; in them {entry['block_mass'][0]:.0%} of the affinity before, "
            f"{entry['block_mass'][1]:.0%} after; effective dimension {entry['effective_dimension']:.1f}"
        )
        title = f"@{space.name}: {space.size} {'heads or groups' if space.kind == 'blocks' else 'units'}"
        figures.append(HeatMap(title, pooled(_hollow(before)), pooled(_hollow(after)), tuple(cuts), note))
    figures += _coupling_maps(shown)
    return tuple(figures)


def _hollow(affinity: Floats) -> Floats:
    """Zeros on the diagonal, which says nothing."""
    return np.asarray(affinity - np.diag(np.diag(affinity)), np.float64)


def _bars(spaces: Mapping[str, Mapping[str, Any]]) -> Iterator[Figure]:
    own = {name: entry for name, entry in spaces.items() if entry["inside"] is None} or spaces
    labels = [f"@{name}" for name in own]
    pairs: tuple[tuple[str, str], ...] = (
        ("block_mass", "Affinity inside the modules"),
        ("bandwidth", "Bandwidth (1: that of equal entries)"),
    )
    for key, title in pairs:
        series = {when: [entry[key][k] for entry in own.values()] for k, when in enumerate(("before", "after"))}
        yield Bars(title, labels, series)
    part = [entry["effective_dimension"] / entry["units"] for entry in own.values()]
    yield Bars("Effective dimension over units", labels, {"participation ratio / units": part})


def _coupling_maps(shown: Shown) -> Iterator[Figure]:
    """Yield the weights between neighbours: what `aligned` makes diagonal by blocks."""
    for (i, j), bound in shown.couplings.items():
        after = bound[np.ix_(shown.made.orders[i], shown.made.orders[j])]
        one, two = shown.found.spaces[i].name, shown.found.spaces[j].name
        root: Callable[[Floats], Floats] = np.sqrt
        yield HeatMap(f"Weights between @{one} and @{two}", pooled(root(bound)), pooled(root(after)))
