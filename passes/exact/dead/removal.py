"""Which dead units can be taken out together: rows stay equally long, every space keeps something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.dead.contributions import Mask, Sum
from cipm_ir.passes.exact.dead.liveness import Liveness
from cipm_ir.passes.pruning.budget.search import even, grids_of, link_spaces
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Keep = dict[Space, Labels]


def removable_units(program: Program, liveness: Liveness, sums: Sequence[Sum]) -> tuple[Keep, Program]:
    """Kept elements of the spaces that lose some, and the program without the others; empty where nothing can go."""
    plan = _Plan(program, liveness, list(sums))
    forced = np.zeros(program.analysis.classes.count, bool)
    while True:
        keep = plan.settle(forced)
        if not keep:
            return {}, program
        try:
            return keep, program.restrict(keep)
        except SymmetryError:
            forced |= plan.refused(keep)


class _Plan:
    def __init__(self, program: Program, liveness: Liveness, sums: list[Sum]) -> None:
        self.program, self.liveness, self.sums = program, liveness, sums
        self.analysis = program.analysis
        self.grids = grids_of(self.analysis)
        links = link_spaces(self.analysis)
        self.groups = [g for g in links.groups if links.frozen.isdisjoint(g)]
        self.groups.sort(key=lambda g: self.program.spaces[g[0]].kind != "blocks")

    def settle(self, forced: Mask) -> Keep:
        """Dead units that can go; what must stay is added to ``forced`` (in place), and the analysis repeated."""
        while True:
            dead = ~self.liveness.alive(self.sums, forced)
            if not dead.any():
                return {}
            keep = self._chosen(dead)
            dropped = ~self._stays(keep)
            extra = dropped & ~dead
            if extra.any():  # a block that matters would go with the last of its contents
                links = self.analysis.classes.links
                held = extra[self.analysis.classes.of[links.parent]]
                forced[self.analysis.classes.of[links.child[held]]] = True
                forced |= extra
                continue
            left = dead & ~dropped & ~forced
            left &= self.liveness.removable
            if not left.any():
                return keep
            forced |= left

    def _stays(self, keep: Mapping[Space, Labels]) -> Mask:
        return np.asarray(self.program.kept_classes(keep), bool)

    def _chosen(self, dead: Mask) -> Keep:
        """Equal numbers from linked spaces, as many as all of them can spare; blocks first."""
        keep: Keep = {}
        pending: list[Keep] = []
        for group in self.groups:
            part = self._from_group(group, dead, keep)
            if part:
                pending.append(part)
                if self.program.spaces[group[0]].kind == "blocks":
                    keep = self._joined([keep, part])
        whole = self._joined(pending)
        if not whole or even(self.analysis, self.grids, self._stays(whole)):
            return whole
        keep = {}
        for part in pending:
            trial = self._joined([keep, part])
            if even(self.analysis, self.grids, self._stays(trial)):
                keep = trial
        return keep

    def _joined(self, parts: Sequence[Keep]) -> Keep:
        return {space: index for part in parts for space, index in part.items()}

    def _from_group(self, group: Sequence[int], dead: Mask, blocks: Keep) -> Keep:
        gone = ~self._stays(blocks) if blocks else np.zeros(len(dead), bool)
        spare: dict[int, Labels] = {}
        for k in group:
            space, table = self.program.spaces[k], self.analysis.spaces[k].table
            if space.kind == "cells" or gone[table[:, 0]].all():
                continue
            free = np.flatnonzero(dead[table].all(axis=1) & ~gone[table[:, 0]])
            spare[k] = free[1:] if len(free) == space.size else free
        number = min((len(s) for s in spare.values()), default=0)
        if not number:
            return {}
        return {
            self.program.spaces[k]: np.setdiff1d(np.arange(self.program.spaces[k].size), s[len(s) - number :])
            for k, s in spare.items()
        }

    def refused(self, keep: Keep) -> Mask:
        """Return classes of what cannot be restricted on its own, or of everything where each part alone could."""
        bad = np.zeros(self.analysis.classes.count, bool)
        for group in self.groups:
            spaces = [self.program.spaces[k] for k in group]
            part = {space: keep[space] for space in spaces if space in keep}
            if part and not self._restricts(part):
                bad |= ~self._stays(part)
        return bad if bad.any() else ~self._stays(keep)

    def _restricts(self, keep: Keep) -> bool:
        try:
            self.program.restrict(keep)
        except SymmetryError:
            return False
        return True
