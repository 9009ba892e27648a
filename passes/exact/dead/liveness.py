"""Which hidden units matter: a backward analysis over the classes of the symmetry analysis.

A unit is alive when one of its positions may change something that matters: an output, a statistic, a term of a sum
whose result is alive. All others are dead *together*: some may feed each other, so none may go while another stays
whose zeros relied on it; what has to stay is declared alive and the analysis is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import State
from cipm_ir.ops.registry import entry_of, lookup
from cipm_ir.passes.exact.dead.contributions import Mask, Sum, all_classes, is_depthwise, mark
from cipm_ir.runtime.intervals.bounds import Intervals, along
from cipm_ir.symmetry.analysis import Analysis

_SWEEPS = 64


class Liveness:
    """What keeps units alive in a graph, apart from the sums: found once, independent of the weights."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.of = analysis.classes.of
        links = analysis.classes.links
        self.parent, self.child = self.of[links.parent], self.of[links.child]
        count = analysis.classes.count
        self.removable = np.zeros(count, bool)
        for space in analysis.spaces:
            self.removable[space.table.ravel()] = True
        self.removable &= analysis.classes.free
        self.summed: Mask = analysis.consumers.normalized.copy()
        """Classes that are read in another way than by a product with a weight."""
        for one in analysis.walk.rec.uniforms:
            if analysis.walk.nodes[one.node].op_type in ("Conv", "ConvTranspose"):  # a sum of weights over channels
                self.summed[self.of[one.factor.labels]] = True
        self.roots: Mask = self.summed.copy()
        self.roots[analysis.classes.parts.cell_part] = True  # their sums are not told apart

    def read(self, found: Intervals, sums: Iterable[Sum], products: Iterable[int] = ()) -> None:
        """Walk over the nodes that are no sums of products, and note what they read.

        Args:
            found: intervals of the values.
            sums: of products, which are told apart otherwise.
            products: positions of other nodes that are left out, since they read all units by weights.
        """
        walk = self.analysis.walk
        known = {*(s.node for s in sums), *products}
        for position, node in enumerate(walk.nodes):
            if position in known:
                continue
            inputs = (walk.input_state(position, k) for k in range(len(node.inputs)))
            states = [state for state in inputs if state is not None]
            if not any(s.factors for s in states):
                continue
            if entry_of(node).reduces:
                self._reduced(found, position)
            elif _by_position(node) or is_depthwise(found, position):
                self._follow(node, states)
            else:
                every = all_classes(self.of, [*states, *self._outputs(node)])
                self.roots[every] = self.summed[every] = True

    def _reduced(self, found: Intervals, position: int) -> None:
        """Where a labelled axis is reduced, only zeros may go (and from sums alone: the walk recorded the others)."""
        node = self.analysis.walk.nodes[position]
        out = self.analysis.walk.states.get(node.outputs[0].name or "")
        bounds = found.operand(position, 0)
        for f in found.state(position, 0).factors:
            if out is not None and any(np.array_equal(f.labels, g.labels) for g in out.factors):
                continue
            classes = self.of[f.labels]
            self.summed[classes] = True
            low, high = (np.ones(f.labels.shape),) * 2 if bounds is None else along(bounds, f)
            self.roots[classes[(low != 0) | (high != 0)]] = True

    def _outputs(self, node: ir.Node) -> list[State]:
        states = self.analysis.walk.states
        return [states[v.name] for v in node.outputs if v.name and v.name in states]

    def _follow(self, node: ir.Node, states: list[State]) -> None:
        """A unit whose label a result has lost (one position left of many) may be anywhere in it: alive."""
        if entry_of(node).sizes_only:
            return
        carried = []
        for state in self._outputs(node):
            here = np.zeros(len(self.roots), bool)
            here[all_classes(self.of, [state])] = True
            self._upward(here)
            carried.append(here)
        for state in states:
            for f in state.factors:
                classes = self.of[f.labels].ravel()
                if not carried or any(not here[classes].any() for here in carried):
                    self.roots[classes] = self.summed[classes] = True

    def _upward(self, flags: Mask) -> None:
        """Blocks of flagged classes, and their blocks."""
        while mark(flags, self.parent, flags[self.child]):
            pass

    def alive(self, sums: list[Sum], forced: Mask) -> Mask:
        """Per class, whether it matters when those in ``forced`` do."""
        classes = self.analysis.classes
        alive = forced | self.roots | ~classes.free | ~(self.removable | classes.block)
        self._upward(alive)
        for _ in range(_SWEEPS):
            changed = False
            for one in reversed(sums):
                for _, marked in one.ending():
                    if not alive[marked.classes].all():
                        changed |= mark(alive, marked.classes, one.reached(marked, alive))
            before = int(alive.sum())
            self._upward(alive)
            if not changed and int(alive.sum()) == before:
                return alive
        return np.ones_like(alive)


def _by_position(node: ir.Node) -> bool:
    entry = lookup(node.domain, node.op_type)
    return entry is None or entry.positionwise  # what reaches an opaque node is pinned
