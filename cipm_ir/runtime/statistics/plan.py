"""What to collect and how: a plan, which needs no symmetry analysis and can be sent anywhere, and its execution."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np

from cipm_ir.errors import CipmError, InputError, OptionError
from cipm_ir.ir.labels import mix
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry
from cipm_ir.runtime.content import model_hash
from cipm_ir.runtime.statistics.lagged import Lagged
from cipm_ir.runtime.statistics.moments import Array, Cofiring, Marginals, MergeableStatistic, Moments
from cipm_ir.runtime.statistics.rows import RowSample
from cipm_ir.runtime.statistics.sites import Site, computed_values, find_sites
from cipm_ir.runtime.statistics.sketch import Hashes, Index, Pairs, Sketch
from cipm_ir.runtime.statistics.store import MEASURES, SpaceStatistics, Statistics
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers
from cipm_ir.symmetry.space import Space

EXACT_SIZE = 4096
"""Up to this many units all pairs are kept (128 MiB in float64); wider spaces are sketched."""
GRAM_SIZE = 16384
"""The largest Gram matrix of a reader's inputs: 2 GiB."""

_PAIRS = ("auto", "exact", "sketch", "none")
_BUFFERED = (4096, 1 << 22)
"""Rows, and entries, that are gathered before they are multiplied."""
_PATCHES = 1 << 23


@dataclass(frozen=True)
class Request:
    """The options of `collect` that say what is summed up."""

    gram: bool = False
    pairs: str = "auto"
    lags: tuple[int, ...] = ()
    measures: tuple[str, ...] = ()
    buckets: int = 1024
    partners: int = 8
    rows: int = 2048

    def __post_init__(self) -> None:
        if self.pairs not in _PAIRS:
            raise OptionError(f"pairs is {self.pairs!r}; it must be one of {', '.join(_PAIRS)}.")
        unknown = sorted(set(self.measures) - set(MEASURES))
        if unknown:
            raise OptionError(f"There is no measure {unknown[0]!r} of similarity; there are {', '.join(MEASURES)}.")
        if any(lag < 1 for lag in self.lags):
            raise OptionError(f"lags is {self.lags}; every lag must be at least 1.")
        for name, least in (("buckets", 1), ("partners", 0), ("rows", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


@dataclass(frozen=True)
class Patches:
    """What a reader of a space reads; readers that read the same have the same ``part``."""

    output: str
    part: str
    source: str
    linear: LinearOpGeometry | None
    """None where the moments of the units are just that."""


@dataclass(frozen=True)
class SpacePlan:
    """What is summed up for one space: ``form`` is "exact", "sketch" or "none"; "follow" is the second run."""

    name: str
    kind: str
    size: int
    sites: tuple[Site, ...]
    form: str
    patches: tuple[Patches, ...] = ()
    pairs: Index | None = None
    gramless: str = ""
    """Why there are no patches, although they were asked for."""


@dataclass(frozen=True)
class Plan:
    """Everything that a worker must know beside the model and the data; ``model``: the hash of that model."""

    request: Request
    spaces: tuple[SpacePlan, ...]
    unseen: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def numbered(self) -> bool:
        """Whether rows need numbers: for the signs of a sketch, and to draw a sample of them."""
        drawn = {"spearman", "information"} & set(self.request.measures)
        return bool(drawn) or any(one.form == "sketch" for one in self.spaces)

    @property
    def values(self) -> tuple[str, ...]:
        """Names of all values that are looked at."""
        names = [site.value for one in self.spaces for site in one.sites]
        names += [p.source for one in self.spaces for p in one.patches if p.linear is not None]
        return tuple(dict.fromkeys(names))


def several(given: Any) -> tuple[Any, ...]:
    """Return a tuple of what was given, of which one alone may stand without brackets."""
    return (given,) if isinstance(given, str | int) else tuple(given)


def make_plan(program: Program, request: Request, spaces: Iterable[Space | str] | None = None) -> Plan:
    """Find where the units of each space can be seen.

    Raises:
        CipmError: as `cipm_ir.runtime.statistics.collect.collect`.
    """
    named = spaces is not None
    chosen = [
        program.space(s if isinstance(s, str) else s.name) for s in (program.spaces if spaces is None else spaces)
    ]
    computed = computed_values(program.model)
    plans, unseen = [], {}
    for space in dict.fromkeys(chosen):
        try:
            plans.append(_space_plan(program, space, request, find_sites(program, space, computed), strict=named))
        except CipmError as error:
            if named:
                raise
            unseen[space.name] = str(error)
    return Plan(request, tuple(plans), unseen, model_hash(program.source_model))


def _space_plan(
    program: Program, space: Space, request: Request, sites: tuple[Site, ...], *, strict: bool
) -> SpacePlan:
    form = request.pairs
    if form == "auto":
        form = "exact" if space.size <= EXACT_SIZE else "sketch"
    patches: tuple[Patches, ...] = ()
    why = ""
    if request.gram:
        try:
            patches = tuple(_patches(program, space, sites, form))
        except CipmError as error:
            if strict:
                raise
            why = f"@{space.name}: no Gram matrices. {error}"
    return SpacePlan(space.name, space.kind, space.size, sites, form, patches, gramless=why)


def _patches(program: Program, space: Space, sites: tuple[Site, ...], form: str) -> Iterator[Patches]:
    known: dict[Any, str] = {}
    for reader in readers(program, space):
        linear = LinearOpGeometry.of(program, reader)
        site = sites[0]
        same = form == "exact" and len(sites) == 1 and not site.whole and linear.size == space.size
        if same and not linear.kernel and np.array_equal(site.positions[:, 0], np.arange(space.size)):
            yield Patches(reader.output, "moments", reader.source, None)
            continue
        if linear.size > GRAM_SIZE:
            raise InputError(
                f"The Gram matrix of the {linear.size} inputs of {reader.output!r} would take "
                f"{linear.size**2 * 8 / 2**30:.0f} GiB; collect spaces= without @{space.name}, or gram=False."
            )
        key = (reader.source, linear.size, linear.kernel, linear.strides, linear.pads, linear.dilations)
        yield Patches(reader.output, known.setdefault(key, f"gram:{reader.output}"), reader.source, linear)


def follow(plan: Plan, found: Statistics) -> Plan | None:
    """Return the second run: exact products for the strongest pairs of sketched spaces.

    None where there is nothing to do.
    """
    chosen = []
    for one in plan.spaces:
        part = found[one.name].parts.get("sketch")
        if not isinstance(part, Sketch) or not plan.request.partners:
            continue
        statistics = found[one.name]
        pairs = part.strongest(statistics.mean, statistics.variance, plan.request.partners)
        chosen.append(SpacePlan(one.name, one.kind, one.size, one.sites, "follow", pairs=pairs))
    return Plan(plan.request, tuple(chosen), model=plan.model) if chosen else None


# ------------------------------------------------------------ execution
class Collector:
    """Carries a plan out: takes the values of one batch after the other."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._spaces = [_SpaceCollector(one, plan.request) for one in plan.spaces]

    def update(self, values: Mapping[str, Array], numbers: Hashes) -> None:
        """Take in a batch; each sample has a number, see `sample_numbers`."""
        for one in self._spaces:
            one.update(values, numbers)

    def result(self, samples: int) -> Statistics:
        """Return the statistics of all batches, ``samples`` in all."""
        spaces = {one.plan.name: one.result(samples) for one in self._spaces}
        return Statistics(spaces, samples, self._plan.unseen, self._plan.model)


class _SpaceCollector:
    def __init__(self, plan: SpacePlan, request: Request) -> None:
        self.plan = plan
        self._lags = request.lags
        self.parts: dict[str, MergeableStatistic] = {}
        if plan.form == "follow":
            self.parts["pairs"] = Pairs.zero(plan.size, plan.pairs)
        else:
            self._prepare(request)
        # Small batches of wide spaces cost more to add than to multiply, so rows are gathered first.
        self._waiting: list[Array] = []
        self._numbers: list[Hashes] = []
        self._rows = 0
        self._most = min(_BUFFERED[0], max(_BUFFERED[1] // max(plan.size, 1), 256))

    def _prepare(self, request: Request) -> None:
        plan, size = self.plan, self.plan.size
        self.parts["moments"] = Moments.zero(size, full=plan.form == "exact")
        self.parts["marginals"] = Marginals.zero(size)
        if plan.form == "sketch":
            self.parts["sketch"] = Sketch.zero(size, request.buckets)
        if "cofiring" in request.measures:
            self.parts["cofiring"] = Cofiring.zero(size)
        if {"spearman", "information"} & set(request.measures):
            self.parts["rows"] = RowSample.zero(size, request.rows)
        for site in plan.sites:
            if len(plan.sites) > 1:
                self.parts[f"site:{site.value}"] = Moments.zero(size, full=False)
            for lag in request.lags:
                self.parts[f"lag {lag}:{site.value}"] = Lagged.zero(size, lag)
        for one in plan.patches:
            if one.linear is not None:
                self.parts.setdefault(one.part, Moments.zero(one.linear.size))

    def update(self, values: Mapping[str, Array], numbers: Hashes) -> None:
        for k, site in enumerate(self.plan.sites):
            read = site.read(values[site.value])
            rows = read.reshape(-1, self.plan.size)
            if rows.dtype not in (np.float32, np.float64):
                rows = rows.astype(np.float32)
            self._site(site, read, rows)
            self._waiting.append(rows)
            self._numbers.append(mix(row_numbers(numbers, len(rows)), salt=100 + k))
            self._rows += len(rows)
            if self._rows >= self._most:
                self._flush()
        done: set[str] = set()
        for one in self.plan.patches:
            if one.linear is not None and one.part not in done:
                done.add(one.part)
                self._gram(one, values[one.source])

    def _site(self, site: Site, read: Array, rows: Array) -> None:
        own = self.parts.get(f"site:{site.value}")
        if isinstance(own, Moments):
            own.update(rows)
        for lag in self._lags if self.plan.form != "follow" else ():
            part = self.parts[f"lag {lag}:{site.value}"]
            if isinstance(part, Lagged):
                if read.ndim > 2:
                    part.update(read.reshape(-1, *read.shape[-2:]))
                else:
                    part.extend(rows)

    def _gram(self, one: Patches, source: Array) -> None:
        part, linear = self.parts[one.part], one.linear
        assert isinstance(part, Moments) and linear is not None
        if not linear.kernel:
            part.update(linear.inputs(source))
            return
        step = max(_PATCHES // max(linear.positions(source) * linear.size, 1), 1)
        for start in range(0, len(source), step):
            part.update(linear.inputs(source[start : start + step]))

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        numbers = np.concatenate(self._numbers)
        self._waiting, self._numbers, self._rows = [], [], 0
        for name in ("moments", "marginals", "cofiring", "pairs"):
            part = self.parts.get(name)
            if isinstance(part, Moments | Marginals | Cofiring | Pairs):
                part.update(rows)
        for name in ("sketch", "rows"):
            part = self.parts.get(name)
            if isinstance(part, Sketch | RowSample):
                part.update(rows, numbers)

    def result(self, samples: int) -> SpaceStatistics:
        self._flush()
        plan = self.plan
        aliases = {one.output: one.part for one in plan.patches}
        parts = dict(self.parts)
        return SpaceStatistics(plan.name, plan.kind, plan.size, samples, parts, aliases, plan.gramless)


def sample_numbers(feeds: Mapping[str, Array], start: int, count: int) -> Hashes:
    """Return a number for each of ``count`` samples, of which the first is number ``start``, however the data is cut.

    It is a hash of the sample, too: what is collected elsewhere starts at 0 as well, and rows that share their number
    would be added to the same bucket of a sketch with the same sign.
    """
    content = np.zeros(count, np.uint64)
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        if array.size and array.ndim and len(array) == count:
            rows = array.reshape(count, -1).view(np.uint8)
            content = mix(content + np.array([crc32(row.data) for row in rows], np.uint64))
    return mix(np.arange(start, start + count, dtype=np.uint64), salt=99) ^ content


def row_numbers(samples: Hashes, rows: int) -> Hashes:
    """Return a number for each row of a batch, from those of its samples."""
    each = max(rows // max(len(samples), 1), 1)
    index = np.arange(rows)
    owner = samples[np.minimum(index // each, len(samples) - 1)]
    return np.asarray(owner + (index % each).astype(np.uint64))
