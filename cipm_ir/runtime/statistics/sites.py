"""Where the units of a space can be seen: the values that are contracted over them, and how to cut rows out of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels, State
from cipm_ir.runtime.inputs.generate import true_inputs
from cipm_ir.runtime.statistics.moments import Array
from cipm_ir.symmetry.consumers import element_places
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space


@dataclass(frozen=True, eq=False)
class Site:
    """A value that holds the units of a space.

    Attributes:
        value: its name.
        axes: the axes along which the units lie.
        box: the part of each of these axes, (start, stop), in which they do.
        positions: (elements, occurrences): flat positions in the box that each element owns.
        whole: the elements are blocks; a block's number is the root mean square of what it holds, which no change of
            gauge inside the block alters but scaling.
    """

    value: str
    axes: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    positions: Labels
    whole: bool = False

    def read(self, array: Array) -> Array:
        """(..., elements): the axes before it are what is sampled over, with samples first."""
        cut = [slice(None)] * array.ndim
        for axis, (start, stop) in zip(self.axes, self.box, strict=True):
            cut[axis] = slice(start, stop)
        array = array[tuple(cut)]
        rest = [a for a in range(array.ndim) if a not in self.axes]
        moved = array.transpose(*rest, *self.axes)
        shape = tuple(array.shape[a] for a in rest)
        flat = moved.reshape(*shape, -1)
        count, occurrences = self.positions.shape
        if occurrences == 1 and not self.whole:
            plain = np.array_equal(self.positions[:, 0], np.arange(flat.shape[-1]))
            return flat if plain else flat[..., self.positions[:, 0]]
        if self.whole:
            held = flat[..., self.positions].astype(np.float32, copy=False)
            return np.asarray(np.sqrt(np.einsum("...ij,...ij->...i", held, held) / occurrences))
        return np.asarray(flat[..., self.positions.T.ravel()].reshape(*shape, occurrences, count))


def find_sites(program: Program, space: Space, computed: Mapping[str, None] | None = None) -> tuple[Site, ...]:
    """Return the values that products sum over the units of a space, in graph order.

    Products with weights are preferred: their inputs are what the sources of `readers` are, too. A space that is only
    read by products of activations (queries and keys) is seen there; one that nothing contracts, in the last value that
    holds it whole. ``computed``: what `computed_values` gives, where it is at hand.

    Raises:
        SymmetryError: no value depends on the inputs and holds every element equally often.
    """
    analysis = program.analysis
    raw = analysis.spaces[program.index(space)]
    element = analysis.elements_of(program.index(space))
    whole = raw.kind == "blocks" or raw.table.shape[1] > 1
    computed = computed_values(program.model) if computed is None else computed
    inside = np.flatnonzero(element >= 0)
    nodes = sorted({c.node for c in analysis.consumers.contractions(inside, refined=True)})
    strong: list[Site] = []
    weak: list[Site] = []
    for position in nodes:
        node = analysis.walk.nodes[position]
        names = [v.name or "" for v in node.inputs if v is not None]
        live = [name for name in dict.fromkeys(names) if name in computed]
        sites = [s for name in live if (s := site_of(program, name, element, whole)) is not None]
        (strong if len(live) < len(dict.fromkeys(names[:2])) else weak).extend(sites)
    found = strong or weak or list(_last(program, computed, element, whole))
    if not found:
        raise SymmetryError(f"No value that depends on the inputs holds the units of @{space.name}, so none is seen.")
    return tuple({site.value: site for site in found}.values())


def computed_values(model: ir.Model) -> dict[str, None]:
    """Return names of the values that depend on the inputs, in graph order."""
    found = {value.name or "": None for value in true_inputs(model)}
    for node in model.graph:
        if any(v is not None and (v.name or "") in found for v in node.inputs):
            found |= {value.name or "": None for value in node.outputs}
    return found


def _last(program: Program, computed: Mapping[str, None], element: Labels, whole: bool) -> Iterator[Site]:
    for name in reversed(list(computed)):
        site = site_of(program, name, element, whole)
        if site is not None:
            yield site
            return


def site_of(program: Program, name: str, element: Labels, whole: bool = False) -> Site | None:
    """Return how a value holds the elements of a space (of each class, its element); None where not all alike."""
    analysis = program.analysis
    state: State | None = analysis.walk.states.get(name)
    touching = [f for f in state.factors if (element[analysis.classes.refined(f.labels)] >= 0).any()] if state else []
    if len(touching) != 1:
        return None
    factor = touching[0]
    owner = element[analysis.classes.refined(factor.labels)].ravel()
    positions = element_places(owner, int(element.max()) + 1)
    if positions is None:
        return None
    where = np.unravel_index(positions, factor.labels.shape)
    box = tuple((int(at.min()), int(at.max()) + 1) for at in where)
    inside = tuple(at - start for at, (start, _) in zip(where, box, strict=True))
    return Site(name, factor.axes, box, np.ravel_multi_index(inside, [stop - start for start, stop in box]), whole)
