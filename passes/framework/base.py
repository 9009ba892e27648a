"""What a pass is: a frozen dataclass whose fields are its options, and `run`, which decides about spaces.

Passes change weights only through the primitives of `Program` (`act`, `restrict`, `absorb`, `refit`).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from cipm_ir.passes.framework.figures import Figure
from cipm_ir.passes.framework.options import check_options, print_options
from cipm_ir.runtime.inputs.data_sizes import data_sizes
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.symmetry.program import Program

Progress = Callable[[str, float | None], None]
"""Called with what is being done and the fraction done (None: unknown)."""


class Kind(enum.Enum):
    """What a pass promises about the function that the model computes."""

    ANALYSIS = "analysis"
    EXACT = "exact"
    APPROXIMATE = "approximate"


def ignore_progress(_what: str, _fraction: float | None) -> None:
    """The progress callback that shows nothing."""


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the program afterwards; the same object where nothing changed.
        changed: the program is not the one that came in.
        summary: one line for people.
        witness: what was done, in the labels of the program that came in: group elements, or kept classes and mixing.
        metrics: numbers and short strings for the report; must be writable as JSON.
        kind: what the result promises, where that depends on options or data; None: what the pass's class promises.
        figures: pictures for the HTML report.
        bit_exact: every output keeps every bit, as under scales that are powers of two; the pipeline demands it then.
    """

    program: Program
    changed: bool = True
    summary: str = ""
    witness: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    kind: Kind | None = None
    figures: tuple[Figure, ...] = ()
    bit_exact: bool = False


@dataclass
class Context:
    """What the pipeline hands to a pass.

    Attributes:
        data: calibration input in any form that `cipm_ir.runtime.inputs.generate.batches` takes, or None.
        seed: of everything random.
        progress: to be called on long work with a word on it and the fraction done.
        verify: the pipeline runs the model before and after; expensive checks of a pass may follow this flag.
        options: settings shared by all passes of a run, by name; passes ignore names that they do not know.
        original: the program before the first pass: budgets such as ``macs=0.5`` are fractions of this one.
        step: the number of the pass in its pipeline, from 0.
        sizes: of dynamic dimensions, by name, at which costs are counted; those of the data.
    """

    data: Data | None = None
    seed: int = 0
    progress: Progress = ignore_progress
    verify: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    original: Program | None = None
    step: int = 0
    sizes: Mapping[str, int] | None = None

    def sizes_of(self, program: Program) -> Mapping[str, int]:
        """Return sizes at which the costs of a program are counted; see `Program.count`."""
        if self.sizes is None:
            self.sizes = data_sizes(program.model, self.data)
        return self.sizes

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers of this pass: the same for the same seed and step."""
        return np.random.default_rng([self.seed, self.step])


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass. Subclass as a frozen dataclass, give the fields defaults and types, decorate with `register`.

    Options are checked when the object is made: the type against the annotation, the value against what `option` says.
    A subclass with its own ``__post_init__`` calls ``super().__post_init__()`` first.

    Class attributes:
        name: of the text form; set by `register`.
        kind: ANALYSIS changes nothing, EXACT keeps the function, APPROXIMATE changes it a little.
        requires: properties that some earlier pass must ensure; the pipeline checks them.
        ensures: properties that hold afterwards, until a pass that changes the program does not preserve them.
        preserves: properties of earlier passes that this one does not destroy.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = Kind.EXACT
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[frozenset[str]] = frozenset()

    @property
    def approximates(self) -> bool:
        """Whether, with these options, the result may compute something else: it is made to be kept."""
        return self.kind is Kind.APPROXIMATE

    def __post_init__(self) -> None:
        check_options(self, self.name or type(self).__name__)

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> PassResult:
        """Do the work. The program is immutable; give back another one, or the same where nothing changed."""

    def __str__(self) -> str:
        return print_options(self, self.name or type(self).__name__)


def option(
    default: Any,
    doc: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a field of a pass with a line of documentation and, where not every value makes sense, what is allowed.

    ``low`` and ``high`` are included, ``above`` is not; for tuples they hold for each entry, and not for None.
    """
    allowed = {"choices": None if choices is None else tuple(choices), "low": low, "high": high, "above": above}
    return field(default=default, metadata={"doc": doc, **allowed})
