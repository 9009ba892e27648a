"""What `equalize` reports: scales and ranges by space, and the signal-to-noise ratio of each weight once quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cipm_ir.passes.exact.canonicalize.members import Floats
from cipm_ir.passes.exact.equalize.solve import Per
from cipm_ir.passes.exact.equalize.terms import Exponents, Term
from cipm_ir.passes.framework.figures import Bars, Figure, Rows
from cipm_ir.symmetry.program import Program

BITS = 8
_BINS = np.arange(-24.5, 25.0)


def metrics_of(program: Program, terms: Sequence[Term], scale: Floats, per: Per) -> dict[str, Any]:
    """By space: group, range and histogram of log2-scales, range imbalance; by weight: the predicted SQNR in dB.

    ``sqnr`` and ``tensors`` are of the entries of weights; ``product_sqnr`` is of what weights are multiplied into, with
    what inputs carry and outputs count. The two can disagree: a column that is large since its input is small has most
    of a weight's energy, but no more of the noise that counts. The objective is the mean of the second.

    Imbalance: standard deviation, in bits, of log2 of the largest magnitudes of a space's units over the weights that
    they are rows or columns of, before and after; 0 where all units fill the range of their tensors equally.
    """
    t = scale.ravel() * float(np.log(2.0))
    tensors: dict[str, list[float]] = {}
    products: list[list[float]] = []
    spread = np.zeros((len(scale), 2)), np.zeros((len(scale), 2))
    for term in terms:
        grid = term.grid
        still = grid.row_size, grid.column_size, float(grid.row_energy.sum())
        tensors[term.name] = []
        products.append([])
        levels = term.levels(t)
        for k, ((rows, columns, energy), found) in enumerate(zip((still, grid.scaled(*levels)), spread, strict=True)):
            tensors[term.name].append(_sqnr(term, rows, energy, per))
            products[-1].append(_product_sqnr(term, (k * levels[0], k * levels[1]), rows, per))
            _add_imbalance(found, ((term.rows, rows), (term.columns, columns)), scale.shape[1])
    spaces = {}
    for space, raw in zip(program.spaces, program.analysis.spaces, strict=True):
        chosen = scale[raw.table[:, 0], : space.group.scales]
        if not chosen.size:
            continue
        counts, _ = np.histogram(chosen, _BINS)
        spaces[space.name] = {
            "group": str(space.group),
            "units": space.size,
            "log2_scale": [float(chosen.min()), float(chosen.max())],
            "histogram": {int(k - 24): int(n) for k, n in enumerate(counts) if n},
            "imbalance": [_mean_square(part[raw.table[:, 0]]) for part in spread],
        }
    both = np.asarray(list(tensors.values()))
    mean = [float(x) for x in both.mean(0)]
    product = [float(x) for x in np.asarray(products).mean(0)]
    return {"sqnr": mean, "product_sqnr": product, "bits": BITS, "per": per, "spaces": spaces, "tensors": tensors}


def _sqnr(term: Term, rows: Floats, energy: float, per: Per) -> float:
    """Signal to quantization noise of a weight in dB, for steps of largest / (2^(bits-1) - 1) and uniform errors.

    ``rows``: largest magnitudes, ``energy``: sum of squares of all.
    """
    shape, count, steps = term.grid.shape, term.grid.count, 2.0 ** (BITS - 1) - 1
    if per == "tensor":
        noise = (float(rows.max()) / steps) ** 2 / 12 * int(np.prod(shape)) * count
    else:
        noise = float(np.square(rows / steps).sum()) / 12 * shape[2] * count
    return float(10 * np.log10(energy / max(noise, 1e-300)))


def _product_sqnr(term: Term, levels: tuple[Floats, Floats], rows: Floats, per: Per) -> float:
    """Signal to quantization noise in dB of the products of a weight, each input and output weighed as in the objective.

    Args:
        term: the weight.
        levels: log-scales of its rows and columns, (groups, rows) and (groups, columns).
        rows: largest magnitudes of its rows at these scales.
        per: one step for a whole weight, or one for each row.
    """
    gain, moment = term.gain * np.exp(-2 * levels[0]), term.moment * np.exp(-2 * levels[1])
    steps = (rows.max() if per == "tensor" else rows.reshape(gain.shape)) / (2.0 ** (BITS - 1) - 1)
    noise = float(((gain * steps**2).sum(1) * moment.sum(1)).sum()) / 12 * term.grid.count
    signal = float((term.counts() * term.moment).sum())  # what surrounds a weight undoes its scales
    return float(10 * np.log10(max(signal, 1e-300) / max(noise, 1e-300)))


def _add_imbalance(found: Floats, ends: Sequence[tuple[Exponents, Floats]], scales: int) -> None:
    """Add to (classes, 2): sum and number of squared deviations of log2 ranges from their mean in the tensor."""
    for table, ranges in ends:
        ranges = ranges.ravel()
        alive = np.flatnonzero((ranges > 0) & (np.diff(table.indptr) > 0))
        if not len(alive):
            continue
        level = np.log2(ranges[alive])
        picked = table[alive]
        where = picked.indices // scales
        square = np.repeat(np.square(level - level.mean()), np.diff(picked.indptr))
        found[:, 0] += np.bincount(where, square, minlength=len(found))
        found[:, 1] += np.bincount(where, minlength=len(found))


def _mean_square(part: Floats) -> float:
    total, count = part.sum(0)
    return float(np.sqrt(total / count)) if count else 0.0


def summary_of(metrics: Mapping[str, Any], spaces: int, lost: int) -> str:
    """Return one line for people."""
    before, after = metrics["product_sqnr"]
    own = "{:.2f} -> {:.2f}".format(*metrics["sqnr"])
    units = sum(entry["units"] for entry in metrics["spaces"].values())
    line = (
        f"{spaces} spaces scaled; mean SQNR of the products of int{BITS} weights per {metrics['per']} "
        f"{before:.2f} -> {after:.2f} dB over {len(metrics['tensors'])} weights (of their entries {own} dB)"
    )
    return line + (f"; {lost} of {units} units keep their scale, which a weight could not take exactly" if lost else "")


def figures_of(metrics: Mapping[str, Any]) -> tuple[Figure, ...]:
    """Signal-to-noise ratio by weight before and after; by space group, scales and imbalance; a histogram of scales."""
    tensors, spaces = metrics["tensors"], metrics["spaces"]
    total: dict[int, int] = {}
    rows = []
    for name, entry in spaces.items():
        counts = {int(power): int(count) for power, count in entry["histogram"].items()}
        for power, count in counts.items():
            total[power] = total.get(power, 0) + count
        low, high = entry["log2_scale"]
        before, after = entry["imbalance"]
        drawn = " ".join(f"2^{power}: {count}" for power, count in counts.items())
        rows.append([f"@{name}", entry["group"], drawn, f"{low:.3g} .. {high:.3g}", f"{before:.2f}", f"{after:.2f}"])
    powers = range(min(total), max(total) + 1)
    series = {when: [pair[k] for pair in tensors.values()] for k, when in enumerate(("before", "after"))}
    head = ["space", "group", "units by scale", "log2 of scales", "imbalance before, bits", "after"]
    return (
        Bars("Predicted weight SQNR", list(tensors), series, "dB"),
        Bars("Scales", [f"2^{k}" for k in powers], {"units": [total.get(k, 0) for k in powers]}, "units"),
        Rows("Spaces", head, rows, texts=3),
    )
