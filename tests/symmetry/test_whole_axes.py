"""One position stands for an axis that every event meets as a whole: the classes are those of all positions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests import zoo

import cipm_ir
from cipm_ir.ops.events import Recorder
from cipm_ir.symmetry.classes import find_classes
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.whole_axes import classes_of, shorten

PARTS = ("of", "count", "free", "block", "real", "signature", "colour")


@pytest.mark.parametrize("name", zoo.names("synthetic", without=("large",)))
def test_classes_are_those_of_all_positions(name: str) -> None:
    walked = cipm_ir.load(zoo.build_or_skip(name)).analysis.walk
    short, every = classes_of(walked), find_classes(walked)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(short, part), getattr(every, part), part)
    for part in ("parent", "child", "event"):
        np.testing.assert_array_equal(getattr(short.links, part), getattr(every.links, part), part)


def ranges(*sizes: int) -> tuple[Recorder, list[LeafFactor], list[np.ndarray]]:
    """Factors of some sizes, the first two coupled position by position."""
    rec = Recorder()
    labels = [rec.allocate(n) for n in sizes]
    factors = [LeafFactor(k, (0,), int(x[0]), (len(x),), rec.variable()) for k, x in enumerate(labels)]
    rec.unify(labels[0], labels[1])
    return rec, factors, labels


def test_whole_axes_have_one_atom() -> None:
    rec, factors, labels = ranges(5, 5, 7)
    rec.pin(labels[2], "a test")
    assert shorten(rec, factors).rec.atoms == 3


EVENTS: dict[str, Callable[[Recorder, list[np.ndarray]], None]] = {
    "a part is pinned": lambda rec, x: rec.pin(x[1][1:3], "a test"),
    "one is pinned": lambda rec, x: rec.pin(x[1][:1], "a test"),
    "a part is equated": lambda rec, x: rec.equate(x[1][:4], ((1, 1),)),
    "its end and size are right, its entries are not": lambda rec, x: rec.pin(x[1][[0, 1, 1, 3, 4]], "a test"),
    "coupled in another order": lambda rec, x: rec.unify(x[1], x[0][::-1]),
    "coupled with a part of another": lambda rec, x: rec.unify(x[1], x[2][1:6]),
    "marked": lambda rec, x: rec.distinguish(x[1][2:]),
    "marked, each on its own": lambda rec, x: rec.distinguish(x[1], np.arange(5)),
}


@pytest.mark.parametrize("what", list(EVENTS))
def test_an_axis_of_which_a_part_is_met_keeps_its_atoms(what: str) -> None:
    """Both axes that are coupled do: the event is on the second alone."""
    rec, factors, labels = ranges(5, 5, 7)
    EVENTS[what](rec, labels)
    assert shorten(rec, factors).rec.atoms == (17 if what.endswith("another") else 11)
