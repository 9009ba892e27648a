"""How the units of a space are merged down to a number: the methods of `fold`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.members import Floats, Members
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.merging.clusters import by_correlation, cosine, indicator, k_means, leaders, variance_gain
from cipm_ir.passes.merging.merge import Merge, is_norm_scale
from cipm_ir.passes.merging.moments import Moments, estimated_moments, measured_moments, observation_sites
from cipm_ir.passes.merging.origin import is_stream
from cipm_ir.passes.merging.rows import UnitRows
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Method: TypeAlias = Literal["least-squares", "k-means", "correlation"]
_DAMPING = 1e-4
"""Of the mean diagonal of the moments; the same for data and for weights."""


@dataclass(frozen=True)
class MethodFacts:
    """What a method needs."""

    name: Method
    moments: bool
    needs_data: bool


METHODS: dict[str, MethodFacts] = {
    "least-squares": MethodFacts("least-squares", True, False),
    "k-means": MethodFacts("k-means", False, False),
    "correlation": MethodFacts("correlation", True, True),
}


@dataclass
class Planner:
    """Plans the merges of one program. ``correct``: make up for lost variance. ``streams``: also residual streams."""

    program: Program
    members: Members
    method: MethodFacts
    ctx: Context
    correct: bool = True
    streams: bool = False
    warnings: list[str] = field(default_factory=list)
    _moments: dict[int, Moments] = field(default_factory=dict)

    def able(self, rows: Mapping[int, UnitRows], refuse: Callable[[Space, str], None]) -> dict[int, UnitRows]:
        """Return spaces that the method can merge; for the others, says why not."""
        rows = dict(rows)
        for k, one in list(rows.items()):
            if not self.streams and is_stream(self.program, self.program.analysis.spaces[k].table[:, 0]):
                refuse(one.space, "several values are added up there; streams=true merges such spaces, too")
                del rows[k]
        if not self.method.moments:
            return rows
        if self.ctx.data is not None:
            return self._measured(rows, refuse)
        out = {}
        for count, (k, one) in enumerate(rows.items()):
            self.ctx.progress("moments of units", count / len(rows))
            try:
                self._moments[k] = estimated_moments(self.members, one)
                out[k] = one
            except SymmetryError as refusal:
                refuse(one.space, str(refusal))
        return out

    def _measured(self, rows: Mapping[int, UnitRows], refuse: Callable[[Space, str], None]) -> dict[int, UnitRows]:
        sites = {}
        for k, one in rows.items():
            try:
                sites[k] = observation_sites(self.program, one)
            except SymmetryError as refusal:
                refuse(one.space, str(refusal))
        self._moments = measured_moments(self.program, sites, self.ctx)
        few = {rows[k].space.name: m.count for k, m in self._moments.items() if m.count and m.count < len(m.mean)}
        if few:
            name, count = next(iter(few.items()))
            size = self.program.space(name).size
            more = f" (and so of {len(few) - 1} more)" if len(few) > 1 else ""
            self.warnings.append(
                f"too few data: {count} values for the {size} units of @{name}, so their moments have rank {count} "
                f"at most and the rest is damping{more}; give more samples"
            )
        still = [rows[k].space.name for k, m in self._moments.items() if m.count and m.count > 1 and m.constant.all()]
        if still:
            more = f" (and of {len(still) - 1} more)" if len(still) > 1 else ""
            self.warnings.append(
                f"all units of @{still[0]}{more} are constant on the data, which says nothing of them; give other data"
            )
        return {k: rows[k] for k in sites}

    def merges(
        self, rows: Mapping[int, UnitRows], numbers: Mapping[int, int], ranks: Mapping[int, Labels]
    ) -> dict[int, Merge]:
        """Return a merge of each space down to its number of units; ``ranks``: its units, the most important first."""
        out = {}
        for count, (k, one) in enumerate(rows.items()):
            self.ctx.progress("merges", count / len(rows))
            out[k] = self._merge(one, numbers[k], ranks[k])
        return out

    def _merge(self, rows: UnitRows, number: int, rank: Labels) -> Merge:
        if self.method.name == "least-squares":
            return least_squares(self._moments[rows.index], np.sort(rank[:number]), rows.reading(), self.correct)
        score = np.empty(len(rank))
        score[rank] = -np.arange(len(rank))
        if self.method.name == "correlation":
            similarity = self._moments[rows.index].correlation
            labels = by_correlation(similarity, number)
        else:
            made = np.concatenate([row.values for row in rows.producers], axis=1)
            labels = k_means(np.concatenate([made, rows.reading()], axis=1), number)
            similarity = cosine(np.concatenate([row.values for row in rows.matrices], axis=1))
        kept, cluster = leaders(labels, score)
        return self._averaged(rows, kept, cluster, similarity)

    def _averaged(self, rows: UnitRows, kept: Labels, cluster: Labels, similarity: Floats) -> Merge:
        mixing, gain = indicator(cluster), None
        if self.correct:
            gain = variance_gain(similarity, cluster)
            if not any(is_norm_scale(self.program, row.member) for row in rows.producers):
                if rows.space.group.scales:
                    mixing = mixing * gain
                gain = None
        return Merge(kept, mixing, cluster, gain)


def least_squares(moments: Moments, kept: Labels, reading: Floats, correct: bool) -> Merge:
    """Return the mixing that makes E|h - mixing h_kept|^2 least, damped.

    With ``correct``, times the factor with which what the readers (units, entries) sum has the variance that it had.
    """
    second = moments.second
    inner = second[np.ix_(kept, kept)]
    damped = inner + _DAMPING * max(float(np.trace(inner)) / len(kept), np.finfo(float).tiny) * np.eye(len(kept))
    mixing = np.linalg.solve(damped, second[kept]).T
    if correct:
        covariance, read = moments.covariance, reading @ reading.T
        before = float((covariance * read).sum())
        after = float((covariance[np.ix_(kept, kept)] * (mixing.T @ read @ mixing)).sum())
        if before > 0 and after > 0:
            mixing = mixing * np.sqrt(before / after)
    return Merge(kept, np.asarray(mixing, np.float64))
