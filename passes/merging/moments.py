"""Second moments of the units of a space where weights read them: measured on data, or estimated from weights alone.

Without data, a unit is f(z), with z its value before the nonlinearity. Inputs of the layer are taken for independent
normal numbers of size one, so that two units are correlated like their rows of weights, bias included. The moments
are then the dual of f (Daniely et al. 2016): with a_k(i) the coefficients of f_i in Hermite polynomials,
E[h_i h_j] = sum_k a_k(i) a_k(j) rho_ij^k. A batch normalization knows the mean and the variance of z: they are used.
For Relu without bias this is the arc-cosine kernel (Cho and Saul 2009). The two sides of a gate count as independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.canonicalize.members import Floats, Members
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.merging.origin import Origin, apply_function, find_origins
from cipm_ir.passes.merging.rows import UnitRows
from cipm_ir.runtime.activations.observe import observe
from cipm_ir.runtime.statistics.moments import Moments as RowMoments
from cipm_ir.runtime.statistics.moments import normalized
from cipm_ir.runtime.statistics.sites import Site, site_of
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers

_POINTS = 513
_FAR = 8.0
"""Sums over equal steps: of a normal density as exact as any rule, and a kink of the nonlinearity costs little."""
_DEGREE = 32
_SAMPLES = 4096
_ROUNDING = 1e-12
"""Of a second moment: a smaller variance is none."""


@dataclass(frozen=True, eq=False)
class Moments:
    """``second`` (units, units): E[h_i h_j]. ``mean`` (units,): E[h_i]. ``count``: measured values of each unit."""

    second: Floats
    mean: Floats
    count: int | None = None

    @property
    def covariance(self) -> Floats:
        """(units, units)."""
        return np.asarray(self.second - np.outer(self.mean, self.mean))

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """(units,): whose variance is nothing but rounding."""
        return np.asarray(np.diag(self.covariance) <= _ROUNDING * np.diag(self.second))

    @property
    def correlation(self) -> Floats:
        """(units, units); a unit that never changes is like nothing but itself."""
        found = self.covariance
        out = normalized(found, np.where(self.constant, 0.0, np.diag(found)))
        np.fill_diagonal(out, 1.0)
        return out


# ---------------------------------------------------------------- from data
def observation_sites(program: Program, rows: UnitRows) -> list[Site]:
    """Return all values in which weights read the units.

    Raises:
        SymmetryError: they lie along no single axis.
    """
    element = program.analysis.elements_of(rows.index)
    names = sorted({r.source for r in readers(program, rows.space)})
    sites = [site for name in names if (site := site_of(program, name, element)) is not None and len(site.axes) == 1]
    if len(sites) < len(names):
        raise SymmetryError("the units do not lie along one axis of the values that are read")
    return sites


def measured_moments(program: Program, sites: Mapping[int, list[Site]], ctx: Context) -> dict[int, Moments]:
    """Moments over data, positions and readers, of several spaces in one run.

    Raises:
        CipmError: as `cipm_ir.runtime.activations.observe.observe`.
    """
    if ctx.data is None or not sites:
        return {}
    names = sorted({site.value for found in sites.values() for site in found})
    sums = {k: RowMoments.zero(len(found[0].positions)) for k, found in sites.items()}
    seen = observe(program.model, names, ctx.data, limit=_SAMPLES, progress=ctx.progress, what="moments of units")
    for _, values in seen:
        for k, found in sites.items():
            for site in found:
                sums[k].update(site.read(values[site.value]).reshape(-1, sums[k].size))
    return {k: Moments(one.second, one.mean, one.count) for k, one in sums.items()}


# ---------------------------------------------------------------- from weights
def estimated_moments(members: Members, rows: UnitRows) -> Moments:
    """Moments of one space from its weights.

    Raises:
        SymmetryError: the units are not functions of products with a weight, each of one unit.
    """
    classes = members.analysis.spaces[rows.index].table[:, 0]
    return _product(members.program, find_origins(members, rows), classes)


def _product(program: Program, origins: Sequence[Origin], classes: Labels) -> Moments:
    """Moments of the product of independent units."""
    parts = [_dual(program, origin, classes) for origin in origins]
    second, mean = parts[0].second, parts[0].mean
    for other in parts[1:]:
        second, mean = second * other.second, mean * other.mean
    return Moments(second, mean)


def _depthwise(program: Program, origin: Origin, classes: Labels) -> tuple[Floats, Floats]:
    """Spreads and correlations behind a depthwise convolution: taps see inputs that are independent of each other."""
    assert origin.taps is not None
    inner = _product(program, origin.inner, classes)
    taps = origin.taps @ origin.taps.T
    found = (inner.covariance if origin.normalized else inner.second) * taps
    spread = np.sqrt(np.maximum(np.diag(found), 0.0))
    safe = np.where(spread > 0, spread, 1.0)
    rho = np.clip(found / np.outer(safe, safe), -1.0, 1.0)
    np.fill_diagonal(rho, 1.0)
    return (origin.spread if origin.normalized else spread), rho


def _dual(program: Program, origin: Origin, classes: Labels) -> Moments:
    points = np.linspace(-_FAR, _FAR, _POINTS)
    density = np.exp(-(points**2) / 2)
    polynomials = _hermite(points) * (density / density.sum())
    spread, rho = _depthwise(program, origin, classes) if origin.inner else (origin.spread, origin.rho)
    values = apply_function(program, origin, classes, origin.mean + np.multiply.outer(points, spread))
    a = values.T @ polynomials.T
    if not np.isfinite(a).all():
        raise SymmetryError("the units overflow on normal inputs")
    second, power = np.zeros_like(rho), np.ones_like(rho)
    for coefficient in a.T:
        second += coefficient[:, None] * power * coefficient
        power *= rho
    return Moments(second, a[:, 0])


def _hermite(points: Floats) -> Floats:
    """Normalized Hermite polynomials at some points: (degrees, points)."""
    out = [np.ones_like(points), points]
    for k in range(2, _DEGREE):
        out.append((points * out[-1] - np.sqrt(k - 1) * out[-2]) / np.sqrt(k))
    return np.stack(out)
