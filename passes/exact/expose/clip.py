"""Clips between constants, written with bounds that each unit has of its own: these take up positive scales."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.passes.exact.expose.gain import free_parameters
from cipm_ir.passes.exact.expose.rewriter import REAL, GraphRewriter
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.program import Program

MIN_OPSET = 8
"""From here on Min and Max broadcast."""


@dataclass
class Unclipped:
    """How many clips were written again, and why others stayed."""

    clips: int = 0
    kept: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Site:
    """A Clip of units along one axis of its input, between two numbers not both of which are 0 or infinite."""

    output: str
    low: float
    high: float
    axis: int
    size: int
    rank: int


def write_bounds(draft: GraphRewriter, *, relu6: bool = True, hardtanh: bool = True) -> Unclipped:
    """Write Clip(x, low, high) as Min(Max(x, low), high) with vectors of bounds, where that frees scales.

    Equal bit for bit. A lower bound of 0 becomes Relu. A symmetric Clip is odd; what it becomes is not, so its units
    lose their signs for scales: ``hardtanh`` says whether. ``relu6`` is for all others. Whether scales are freed is
    asked of the analysis.
    """
    done = Unclipped()
    found = [(node, *bounds) for node in draft.graph if (bounds := clip_bounds(draft, node)) is not None]
    found = [(n, low, high) for n, low, high in found if (hardtanh if low == -high else relu6)]
    if not found:
        return done
    if draft.version < MIN_OPSET:
        done.kept[f"opset {draft.version} has no Min that broadcasts"] += len(found)
        return done
    analysis = Program.of(draft.model).analysis
    sites = []
    for node, low, high in found:
        where = _units(analysis, node)
        if where is None:
            done.kept["no units along exactly one axis"] += 1
        else:
            sites.append(Site(node.outputs[0].name or "", low, high, *where))
    good = _freed(draft, sites)
    done.kept["scales end elsewhere on its units"] += len(sites) - len(good)
    for site in good:
        rewrite(draft, site)
    done.clips = len(good)
    done.kept = +done.kept
    return done


def clip_bounds(draft: GraphRewriter, node: ir.Node) -> tuple[float, float] | None:
    """Return the constant bounds of a Clip of floating-point values, infinite where there is none."""
    if node.op_type != "Clip" or node.domain or node.inputs[0] is None:
        return None
    if draft.dtype(node.inputs[0]) not in REAL:
        return None
    bounds: list[float] = []
    for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        value = node.inputs[index] if index < len(node.inputs) else None
        number = draft.scalar(value) if value is not None else float(attribute(node, name, default))
        if number is None or np.isnan(number):
            return None
        bounds.append(number)
    low, high = bounds
    free = all(bound == 0 or np.isinf(bound) for bound in bounds)  # scales pass as it is
    return None if free or low >= high else (low, high)


def _units(analysis: Analysis, node: ir.Node) -> tuple[int, int, int] | None:
    """Return the one axis of the Clip's input along which units lie, how many, and the number of axes."""
    value = node.inputs[0]
    state = analysis.walk.states.get("" if value is None else value.name or "")
    if state is None:
        return None
    free = np.zeros(analysis.classes.count, bool)
    for space in analysis.spaces:
        free[space.table] = True
    found = [f for f in state.factors if free[analysis.classes.of[f.labels]].all()]
    if len(found) != 1 or len(found[0].axes) != 1:
        return None
    return found[0].axes[0], int(found[0].labels.size), state.rank


def _freed(draft: GraphRewriter, sites: list[Site]) -> list[Site]:
    """Return the sites whose bounds are free to scale when all are written with vectors."""
    if not sites:
        return []
    model = draft.model.clone()
    trial = GraphRewriter(model, draft.split)
    bounds = {site.output: rewrite(trial, site) for site in sites}
    scaled = free_parameters(Program.of(model), "scale")
    return [site for site in sites if set(bounds[site.output]) <= scaled]


def rewrite(draft: GraphRewriter, site: Site) -> list[str]:
    """Replace the Clip that makes this output; gives the names of the new bounds."""
    node = next(one for one in draft.graph if one.outputs and one.outputs[0].name == site.output)
    x = node.inputs[0]
    assert x is not None
    dtype = draft.dtype(x)
    assert dtype is not None
    shape = (site.size, *(1,) * (site.rank - site.axis - 1))
    steps: list[tuple[str, ir.Value | None]] = []
    names = []
    for op, bound, word in (("Max", site.low, "low"), ("Min", site.high, "high")):
        if np.isinf(bound):
            continue
        if bound == 0 and op == "Max":
            steps.append(("Relu", None))
            continue
        made = draft.initializer(f"{site.output}_{word}", np.full(shape, bound), dtype)
        names.append(made.name or "")
        steps.append((op, made))
    out = draft.take_over(node.outputs[0], f"{site.output}_clip")
    for number, (op, bounds) in enumerate(steps, start=1):
        made = out if number == len(steps) else draft.twin(out, f"{site.output}_{op.lower()}")
        given = [x] if bounds is None else [x, bounds]
        name = node.name if made is out else None
        draft.graph.insert_before(node, draft.new_node(node, op, given, made, name))
        x = made
    draft.graph.remove(node, safe=True)
    return names
