"""What calibration data says of each space: read it, add it to that of other data, write it to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError, OptionError
from cipm_ir.runtime.statistics import files as statistics_files
from cipm_ir.runtime.statistics.lagged import Lagged
from cipm_ir.runtime.statistics.moments import (
    Array,
    Cofiring,
    Floats,
    Marginals,
    MergeableStatistic,
    Moments,
    normalized,
)
from cipm_ir.runtime.statistics.rows import RowSample
from cipm_ir.runtime.statistics.sketch import Index, Pairs, Sketch

_Kind = TypeVar("_Kind")

MEASURES = ("correlation", "cosine", "cofiring", "spearman", "information", "lagged")
"""How alike two units are, see `SpaceStatistics.similarity`; the last four only where they were asked for."""
_FACTS = ("name", "kind", "size", "samples", "gramless")
"""What of `SpaceStatistics` is written beside its parts and readers."""


class Grams(Mapping[str, Floats]):
    """E[u u^T] by the output of a reader: u is what it reads, patches of a convolution unfolded, and a 1 appended.

    ``why``: what a `KeyError` says where there is none.
    """

    def __init__(self, moments: Mapping[str, Moments], why: str = "") -> None:
        self.moments = dict(moments)
        self._why = why

    def __getitem__(self, output: str) -> Floats:
        if output not in self.moments:
            raise KeyError(self._why or f"There is no Gram matrix of what {output!r} reads.")
        return self.moments[output].bordered

    def __iter__(self) -> Iterator[str]:
        return iter(self.moments)

    def __len__(self) -> int:
        return len(self.moments)


@dataclass(frozen=True)
class SpaceStatistics:
    """What was seen of one space, at all values that are contracted over its units.

    All (size,) and (size, size) arrays are in the order of the space's elements. A row is one sample, token or pixel.
    An element of a space of blocks is seen as the root mean square of what it holds.

    Attributes:
        name, kind, size: of the space.
        samples: how many samples of the data.
        parts: the sums, by name; ``a + b`` adds those of the same name.
        readers: by output of a reader, the part that holds the moments of what it reads.
        gramless: why there are none, although they were asked for; a sentence.
    """

    name: str
    kind: str
    size: int
    samples: int
    parts: Mapping[str, Any] = field(repr=False)
    readers: Mapping[str, str] = field(default_factory=dict, repr=False)
    gramless: str = ""

    def __add__(self, other: SpaceStatistics) -> SpaceStatistics:
        """Return the statistics of the data of both; exact. Raises: InputError where they are of different kinds."""
        # Pairs that were followed depend on the data, and data that can be read once has none: what both have is added.
        parts = [one.parts.keys() - {"pairs"} for one in (self, other)]
        if (self.name, self.kind, self.size, parts[0]) != (other.name, other.kind, other.size, parts[1]):
            raise InputError(
                f"Statistics of @{self.name} ({self.size}) and @{other.name} ({other.size}) cannot be added; "
                "collect both from the same model with the same options."
            )
        added = {name: part + other.parts[name] for name, part in self.parts.items() if name in other.parts}
        return replace(self, samples=self.samples + other.samples, parts=added)

    def _part(self, name: str, kind: type[_Kind], ask: str) -> _Kind:
        part = self.parts.get(name)
        if not isinstance(part, kind):
            raise OptionError(f"The statistics of @{self.name} hold no {name}; collect them with {ask}.")
        return part

    # ------------------------------------------------------------ units
    @property
    def moments(self) -> Moments:
        """Count, mean and centred second moments of all sites together."""
        return self._part("moments", Moments, "collect()")

    @property
    def marginals(self) -> Marginals:
        """Firing and extremes."""
        return self._part("marginals", Marginals, "collect()")

    @property
    def count(self) -> int:
        """How many rows."""
        return self.moments.count

    @property
    def mean(self) -> Floats:
        """(size,)."""
        return self.moments.mean

    @property
    def variance(self) -> Floats:
        """(size,), divided by the count."""
        return self.moments.variance

    @property
    def squares(self) -> Floats:
        """E[x²], (size,)."""
        return self.variance + self.mean**2

    @property
    def firing(self) -> Floats:
        """The fraction of rows in which a unit is above zero, (size,)."""
        return self.marginals.positive / max(self.marginals.count, 1)

    @cached_property
    def constant(self) -> npt.NDArray[np.bool_]:
        """(size,): units with the same value in every row, up to float32 rounding."""
        largest = np.maximum(np.abs(self.marginals.minimum), np.abs(self.marginals.maximum))
        return np.asarray(np.sqrt(self.variance) <= 1e-6 * largest)

    @property
    def _spread(self) -> Floats:
        """The variance without what is only rounding."""
        return np.where(self.constant, 0.0, self.variance)

    @property
    def sites(self) -> dict[str, Moments]:
        """Count, mean and variance by the name of the value in which the units were seen."""
        return {name[5:]: part for name, part in self.parts.items() if name.startswith("site:")}

    # ------------------------------------------------------------ pairs of units
    @property
    def exact(self) -> bool:
        """Whether all pairs were kept; otherwise correlations are estimates, see `standard_error`."""
        return self.moments.full

    @property
    def standard_error(self) -> float:
        """A bound on the standard error of a correlation that comes from the sketch; 0 where all pairs were kept."""
        return 0.0 if self.exact else self._part("sketch", Sketch, 'pairs="auto"').standard_error

    @property
    def covariance(self) -> Floats:
        """(size, size), divided by the count; an estimate where `exact` is false."""
        if self.exact:
            return self.moments.covariance
        root = np.sqrt(self.variance)
        out = self.correlation * root
        out *= root[:, None]
        return out

    @property
    def second(self) -> Floats:
        """E[x x^T], (size, size); an estimate where `exact` is false."""
        if self.exact:
            return self.moments.second
        return self.covariance + np.outer(self.mean, self.mean)

    @cached_property
    def correlation(self) -> Floats:
        """Pearson's, (size, size): 1 on the diagonal, 0 for constant units; an estimate where `exact` is false.

        Pairs that were followed exactly are exact in the estimate, too.
        """
        if self.exact:
            out = normalized(self.moments.covariance, self._spread)
            np.fill_diagonal(out, ~self.constant)
            return out
        sketch = self._part("sketch", Sketch, 'pairs="auto"')
        out = sketch.correlation(self.mean, self._spread).astype(np.float64)
        pairs = self.parts.get("pairs")
        if isinstance(pairs, Pairs):
            i, j = pairs.pairs.T
            out[i, j] = out[j, i] = pairs.correlation
        return out

    def strongest(self, count: int | None = None, minimum: float = 0.0) -> tuple[Index, Floats, Floats]:
        """Return the pairs of units with the largest absolute correlations.

        Args:
            count: at most so many; None takes all (of a sketched space, all that were followed).
            minimum: absolute correlations below this are left out.

        Returns: pairs (m, 2) with i < j, their correlations (m,), largest first, and the standard errors of these (m,).
        """
        pairs = self.parts.get("pairs")
        if isinstance(pairs, Pairs):
            index, value, error = pairs.pairs, pairs.correlation, 0.0
        elif self.exact or self.size <= 4096:
            index = np.stack(np.triu_indices(self.size, 1), 1)
            value, error = self.correlation[index[:, 0], index[:, 1]], self.standard_error
        else:
            index = self._part("sketch", Sketch, 'pairs="auto"').strongest(self.mean, self._spread, 8)
            value, error = self.correlation[index[:, 0], index[:, 1]], self.standard_error
        order = np.argsort(-np.abs(value), kind="stable")[:count]
        order = order[np.abs(value[order]) >= minimum]
        return index[order], value[order], np.full(len(order), error)

    def lagged(self, lag: int) -> Floats:
        """Correlation of unit i with unit j ``lag`` steps later, (size, size), over all sites.

        Steps go along the last axis of a value that is not the units' (tokens, columns of an image), over the places of
        a unit that owns several, and along the order of the samples where there is neither.
        """
        found = [p for name, p in self.parts.items() if isinstance(p, Lagged) and p.lag == lag]
        if not found:
            raise OptionError(f"The statistics of @{self.name} hold no lag {lag}; collect them with lags=({lag},).")
        total = found[0]
        for part in found[1:]:
            total = total.pooled(part)
        return total.correlation

    def similarity(self, measure: str = "correlation") -> Floats:
        """Return how alike pairs of units are, (size, size), between -1 and 1.

        * ``correlation``: Pearson's.
        * ``cosine``: of the uncentred vectors.
        * ``cofiring``: of the events "above zero" (phi coefficient).
        * ``spearman``: of the ranks, on a random sample of rows.
        * ``information``: mutual information, as the correlation of a Gaussian pair with as much, on that sample.
        * ``lagged``: of the lags that were asked for, the correlation of largest size in either direction.

        Raises:
            OptionError: another name, or one that was not asked for.
        """
        known: dict[str, Callable[[], Floats]] = {
            "correlation": lambda: self.correlation,
            "cosine": lambda: normalized(self.second, self.squares),
            "cofiring": lambda: self._part("cofiring", Cofiring, 'measures=("cofiring",)').phi,
            "spearman": lambda: self._part("rows", RowSample, 'measures=("spearman",)').spearman,
            "information": lambda: self._part("rows", RowSample, 'measures=("information",)').information(),
            "lagged": self._largest_lag,
        }
        if measure not in known:
            raise OptionError(f"There is no measure {measure!r} of similarity; there are {', '.join(MEASURES)}.")
        return known[measure]()

    def _largest_lag(self) -> Floats:
        lags = sorted({p.lag for p in self.parts.values() if isinstance(p, Lagged)})
        if not lags:
            raise OptionError(f"The statistics of @{self.name} hold no lags; collect them with lags=(1,).")
        best = self.lagged(lags[0])
        for one in (m for lag in lags for m in (self.lagged(lag), self.lagged(lag).T)):
            best = np.where(np.abs(one) > np.abs(best), one, best)
        np.fill_diagonal(best, ~self.constant)
        return np.asarray(best)

    # ------------------------------------------------------------ readers
    @property
    def gram(self) -> Grams:
        """E[u u^T] by output of a reader, (K + 1, K + 1), the last for the appended 1; empty unless ``gram=True``."""
        return Grams({output: self.parts[part] for output, part in self.readers.items()}, self.gramless)

    # ------------------------------------------------------------ enough data?
    @cached_property
    def rank(self) -> int:
        """Rank of the covariance of the units, up to float32 rounding; of the sketch where `exact` is false."""
        if self.exact:
            matrix: Array = normalized(self.moments.covariance, self._spread)
        else:
            white = self._part("sketch", Sketch, 'pairs="auto"').whitened(self.mean, self._spread)
            matrix = (white @ white.T).astype(np.float64)
        values = np.linalg.eigvalsh(matrix)
        found = (
            int((values > max(values[-1], 0.0) * len(values) * np.finfo(np.float32).eps).sum()) if len(values) else 0
        )
        return min(found, max(self.count - 1, 0))

    @property
    def warning(self) -> str:
        """What there is too little data for, in one sentence; empty where there is enough."""
        if self.count <= self.size:
            # An eigenvalue problem is worth its time for a small space; for a large one the bound says enough.
            rank = str(self.rank) if self.size <= 1024 else f"at most {max(self.count - 1, 0)}"
            return (
                f"@{self.name}: {self.count} rows of {self.samples} samples for {self.size} units; their covariance "
                f"has rank {rank}, so give more data, or damping decides."
            )
        for output, moments in self.gram.moments.items():
            if moments.count <= moments.size:
                return (
                    f"@{self.name}: {moments.count} rows for the {moments.size} inputs of {output!r}; their Gram "
                    f"matrix has at most rank {moments.count}, so give more data, or damping decides."
                )
        return ""


class Statistics(Mapping[str, SpaceStatistics]):
    """`SpaceStatistics` by name of the space; ``a + b`` is what the data of both would have given.

    Attributes:
        spaces: by name.
        samples: how many samples of the data.
        unseen: spaces that could not be seen, and why.
        model: a hash of nodes and weights of the model; "" where it is not known.
    """

    def __init__(
        self,
        spaces: Mapping[str, SpaceStatistics],
        samples: int,
        unseen: Mapping[str, str] | None = None,
        model: str = "",
    ) -> None:
        self.spaces = dict(spaces)
        self.samples = samples
        self.unseen = dict(unseen or {})
        self.model = model

    def __getitem__(self, name: str) -> SpaceStatistics:
        name = name.removeprefix("@")
        if name not in self.spaces:
            raise KeyError(self.unseen.get(name) or f"There are no statistics of a space named {name!r}.")
        return self.spaces[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spaces)

    def __len__(self) -> int:
        return len(self.spaces)

    def __repr__(self) -> str:
        return f"Statistics({len(self)} spaces, {self.samples} samples)"

    def __add__(self, other: Statistics) -> Statistics:
        """Raise `InputError` where the two are of different models or were collected with different options."""
        if not isinstance(other, Statistics):
            return NotImplemented
        if set(self.spaces) != set(other.spaces):
            missing = sorted(set(self.spaces) ^ set(other.spaces))[0]
            raise InputError(f"Only one of the two statistics has @{missing}; collect both from the same model.")
        if self.model and other.model and self.model != other.model:
            raise InputError(
                "Statistics of two models cannot be added, as their nodes, names or weights differ; "
                "collect both from the same model."
            )
        spaces = {name: one + other.spaces[name] for name, one in self.spaces.items()}
        return Statistics(spaces, self.samples + other.samples, self.unseen, self.model or other.model)

    def __radd__(self, other: object) -> Statistics:
        """``sum(shards)`` begins with 0."""
        return self if other == 0 else NotImplemented

    @property
    def warnings(self) -> tuple[str, ...]:
        """What there is too little data for, and Gram matrices that cannot be had; a sentence for each."""
        return tuple(text for one in self.spaces.values() for text in (one.warning, one.gramless) if text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file, whole or not at all; `load` reads it.

        Raises:
            OutputError: the result cannot be written.
        """
        spaces = [{key: getattr(one, key) for key in _FACTS} | {"readers": dict(one.readers)} for one in self.values()]
        facts = {"samples": self.samples, "unseen": self.unseen, "spaces": spaces, "model": self.model}
        statistics_files.write(path, facts, [one.parts for one in self.values()])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or not one of these.
        """
        return statistics_files.read(path, cls._restored)

    @classmethod
    def _restored(cls, facts: Mapping[str, Any], parts: Sequence[Mapping[str, MergeableStatistic]]) -> Statistics:
        spaces = {}
        for known, own in zip(facts["spaces"], parts, strict=True):
            plain = {key: known[key] for key in _FACTS if key in known}  # older files have fewer
            spaces[known["name"]] = SpaceStatistics(parts=own, readers=known["readers"], **plain)
        return cls(spaces, int(facts["samples"]), facts["unseen"], facts.get("model", ""))
