"""Options of passes, their text form, and the registry."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from cipm_ir.errors import OptionError
from cipm_ir.passes.framework import registry
from cipm_ir.passes.framework.base import Context, Pass, PassResult, option
from cipm_ir.passes.framework.options import options_of
from cipm_ir.passes.framework.parser import parse_passes, print_passes
from cipm_ir.symmetry.program import Program


@registry.register("toy")
@dataclass(frozen=True)
class Toy(Pass):
    """Does nothing; has an option of every type."""

    macs: float | None = option(None, "fraction that may remain", above=0, high=1)
    scope: str = option("global", "where to rank", choices=("local", "global"))
    norm: Literal["l1", "l2"] = "l2"
    round_to: int = option(1, "widths are multiples of this", low=1)
    exact: bool = True
    include: tuple[str, ...] = ()
    window: tuple[int, float] = (1, 2.0)
    label: str | None = None

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult(program, False)


@registry.register("toy-plain")
@dataclass(frozen=True)
class Plain(Pass):
    """Has no options."""

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult(program, False)


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("toy", Toy()),
        (" toy { } ", Toy()),
        ("toy{macs=0.5, scope=local}", Toy(macs=0.5, scope="local")),
        ("toy{macs=1}", Toy(macs=1.0)),
        ("toy{macs=none}", Toy()),
        ("toy{round-to=8,exact=False}", Toy(round_to=8, exact=False)),
        ("toy{include=a}", Toy(include=("a",))),
        ("toy{include=(a/b.c[*], 'd')}", Toy(include=("a/b.c[*]", "'d'"))),
        ('toy{include=("x, y={", "q\\"\\\\")}', Toy(include=("x, y={", 'q"\\'))),
        ("toy{include=()}", Toy()),
        ("toy{window=(3, 4)}", Toy(window=(3, 4.0))),
        ("toy{label=none}", Toy(label=None)),
        ('toy{label="none"}', Toy(label="none")),
        ('toy{label="5"}', Toy(label="5")),
        ('toy{label="true"}', Toy(label="true")),
        ("toy{label=}", None),
        ("toy{norm=L1}", Toy(norm="l1")),
        ("toy{macs=1e-3}", Toy(macs=1e-3)),
    ],
)
def test_text_is_read_and_printed(text: str, made: Toy | None) -> None:
    if made is None:
        with pytest.raises(OptionError, match="where a value should be"):
            parse_passes(text)
        return
    assert parse_passes(text) == (made,)
    assert parse_passes(str(made)) == (made,)


def test_a_pipeline_is_read_and_printed() -> None:
    passes = parse_passes(["toy{macs=0.5}, toy-plain", Toy(round_to=2), Plain, "toy"])
    assert passes == (Toy(macs=0.5), Plain(), Toy(round_to=2), Plain(), Toy())
    assert print_passes(passes) == "toy{macs=0.5}, toy-plain, toy{round_to=2}, toy-plain, toy"
    assert parse_passes(print_passes(passes)) == passes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["where the name of a pass should be"]),
        ("toy,", ["where the name of a pass should be"]),
        ("toi", ["no pass named 'toi'", "toy"]),
        ("toy{", ["column 5"]),
        ("toy{macs=0.5", ["'}' should be"]),
        ("toy}", ["column 4", "'}'"]),
        ("toy toy", ["comma"]),
        ("toy{macs}", ["'=' should be"]),
        ("toy{mac=0.5}", ["'toy'", "'mac'", "did you mean macs?"]),
        ("toy{zzz=0.5}", ["'toy'", "'zzz'", "it takes macs, scope"]),
        ("toy-plain{a=1}", ["'toy-plain'", "takes none"]),
        ("toy{macs=half}", ["'toy'", "'macs'", "a number above 0 and at most 1, or none", "'half'"]),
        ("toy{macs=0}", ["'macs'", "above 0"]),
        ("toy{macs=1.5}", ["'macs'", "at most 1"]),
        ("toy{macs=nan}", ["'macs'"]),
        ("toy{macs=(0.5, 1)}", ["'macs'"]),
        ('toy{macs="0.5"}', ["'macs'"]),
        ("toy{scope=here}", ["'scope'", "one of local, global", "'here'"]),
        ("toy{norm=l3}", ["'norm'", "l1, l2"]),
        ("toy{round_to=0.5}", ["'round_to'", "a whole number at least 1"]),
        ("toy{exact=yes}", ["'exact'", "true or false"]),
        ("toy{window=(1)}", ["'window'"]),
        ("toy{macs=0.5, macs=0.6}", ["given twice"]),
        ('toy{label="open}', ["quote"]),
    ],
)
def test_bad_text_is_named(text: str, words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_passes(text)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith((".", "?"))


def test_options_are_checked_in_python_too() -> None:
    for options in ({"macs": 2}, {"macs": "0.5"}, {"exact": 1}, {"round_to": True}, {"round_to": 1.5}, {"include": 3}):
        with pytest.raises(OptionError, match=next(iter(options))):
            Toy(**options)
    assert Toy(include="stem").include == ("stem",)  # type: ignore[arg-type]
    assert isinstance(Toy(macs=1).macs, float)
    for wrong in (3, [3], None):
        with pytest.raises(OptionError, match="passes= takes"):
            parse_passes(wrong)  # type: ignore[arg-type]


# --- registry -------------------------------------------------------------------------------------


def test_a_name_is_taken_once() -> None:
    @dataclass(frozen=True)
    class Other(Toy):
        """Wants a name that is taken."""

    with pytest.raises(OptionError, match="exists already"):
        registry.register("toy")(Other)
    with pytest.raises(OptionError, match="lower-case"):
        registry.register("Not A Name")(Other)
    assert registry.lookup("toy") is Toy


def test_only_frozen_dataclasses_that_are_passes() -> None:
    class Bare(Toy):
        """Forgot the decorator."""

    with pytest.raises(OptionError, match="dataclass"):
        registry.register("toy-bare")(Bare)
    with pytest.raises(OptionError, match="subclass"):
        registry.register("toy-int")(int)  # type: ignore[type-var]


def test_listing_tells_options() -> None:
    (entry,) = (line for line in registry.listing() if line.name == "toy")
    assert entry.doc == "Does nothing; has an option of every type."
    assert [found.name for found in entry.options] == [found.name for found in options_of(Toy)]
    assert entry.options[1].allowed == "one of local, global"
    assert {"clean-up", "fold-batch-norm"} <= set(registry.names())


class Point:
    """Stands in for an installed entry point."""

    def __init__(self, name: str, loaded: Any) -> None:
        self.name, self.value, self.loaded, self.dist = name, "other.module:Class", loaded, None

    def load(self) -> Any:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Foreign(Pass):
        """From elsewhere."""

        def run(self, program: Program, ctx: Context) -> PassResult:
            return PassResult(program, False)

    points = [Point("foreign", Foreign), Point("broken", ImportError("no module named x"))]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == registry.GROUP else [])
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))
    assert parse_passes("foreign") == (Foreign(),)
    with pytest.raises(OptionError, match=r"'broken'.*no module named x"):
        registry.lookup("broken")
    faults = {line.name: line.fault for line in registry.listing()}
    assert faults["broken"] and not faults["foreign"] and not faults["toy"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("prune(macs=0.5)", "prune{macs=0.5}"),
        ("prune[macs=0.5]", "prune{macs=0.5}"),
        ("prune<macs=0.5>", "prune{macs=0.5}"),
        ("prune:macs=0.5", "prune{macs=0.5}"),
        ("prune macs=0.5", "prune{macs=0.5}"),
        ("prune --macs 0.5", "prune{macs=0.5}"),
        ("prune={macs=0.5}", "prune{macs=0.5}"),
        ("prune{{macs=0.5}}", "prune{macs=0.5}"),
        ("prune{macs:0.5}", "prune{macs=0.5}"),
        ("prune{'macs': 0.5}", "prune{macs=0.5}"),
        ("prune{macs==0.5}", "prune{macs=0.5}"),
        ("prune{macs=0,5}", "prune{macs=0.5}"),
        ("prune{macs=0.5", "prune{macs=0.5}"),
        ("prune{0.5}", "prune{macs=0.5}"),
        ("prune(0.5)", "prune{macs=0.5}"),
        ("prune(50%)", "prune{macs=0.5}"),
        ("prune(macs=50%, norm=l1)", "prune{macs=0.5, norm=l1}"),
        ("prune{include=[a,b], macs=0.5}", "prune{include=(a,b), macs=0.5}"),
        ("clean-up, prune(min-keep=4, macs=0.5)", "prune{min_keep=4, macs=0.5}"),
        ("canonicalize prune{macs=0.5}", "canonicalize, prune"),
        ("equalize()", "equalize"),
    ],
)
def test_the_right_spelling_is_named(text: str, meant: str) -> None:
    """What is named can be read, as far as it is a whole pass."""
    with pytest.raises(OptionError, match=re.escape(f"write {meant!r}")):
        parse_passes(text)
    if meant != "canonicalize, prune":
        parse_passes(meant)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("prune{macs=50}", "write 0.5 for 50%"),
        ("prune{macs=50%}", "write 0.5 for 50%"),
        ('prune{macs="50%"}', "write 0.5 for 50%"),
        ("prune{macs=1/2}", "write 0.5"),
        ('prune{macs="0.5"}', "without quotation marks"),
        ("fold{ratio=12.5%}", "write 0.125 for 12.5%"),
        ("prune{mac=0.5}", "did you mean macs?"),
        ("Prune{macs=0.5}", "did you mean prune?"),
        ("fold_batch_norm", "did you mean fold-batch-norm?"),
    ],
)
def test_values_and_names_near_a_right_one(text: str, hint: str) -> None:
    with pytest.raises(OptionError, match=re.escape(hint)):
        parse_passes(text)


@pytest.mark.parametrize(
    "text", ["prune{macs=0.5}", "prune{macs=.5, include=(a, b)}", 'prune{macs=1, include="a b"}', "equalize{}"]
)
def test_what_is_spelled_right_is_read(text: str) -> None:
    """Control: no hint where nothing is wrong."""
    assert parse_passes(text)


@pytest.mark.parametrize("text", ["prune{macs=150}", "prune{macs=-1}", "prune{macs=half}", "prune{round_to=50%}"])
def test_no_hint_where_none_is_known(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_passes(text)
    assert "write" not in str(caught.value)
