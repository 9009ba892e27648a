"""How many single edits of a model the verification sees, and what the ones are that it misses.

    python -m tests.benchmarks.mutations [--count 2000] [--seed 0] [--models NAME,...] [--kinds NAME,...]

For each model of the zoo, its copies in other gauges (random elements of its group, the canonical form) are verified as
they are, which must not fail, and with one edit, which must. What is missed is measured in double precision: an edit
that moves nothing is equivalent, one that moves less than the rounding cannot be seen; the rest are listed as visible.
With `--check-caught` the caught ones are measured too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from tests import zoo
from tests.oracles.double_precision import HIDDEN, Effect, Feeds, Single, effect, probes
from tests.oracles.mutations import KINDS, STRUCTURAL, Mutant, mutate

import cipm_ir
from cipm_ir.runtime.verification.verify import Verification, verify_models
from cipm_ir.symmetry.program import Program

_GAUGES = 3
_ATTEMPTS = 6
"""How often a kind of edit is tried on a model before the next kind is."""


@dataclass(frozen=True)
class Trial:
    """One edit of one copy of one model, what the verification said, and what the edit does where it was missed."""

    model: str
    gauge: str
    edit: str
    kind: str
    found: Verification
    effect: Effect | None

    @property
    def verdict(self) -> str:
        """caught, not verified, or why it was missed."""
        if self.found.ok is False:
            hidden = self.effect is not None and self.effect.verdict in HIDDEN
            return f"caught, {self.effect.verdict}" if hidden and self.effect else "caught"
        if self.found.ok is None:
            return "not verified"
        return self.effect.verdict if self.effect is not None else "missed"

    def __str__(self) -> str:
        measured = f" [{self.effect}]" if self.effect else ""
        return f"{self.model} ({self.gauge}), {self.edit}{measured}"


def gauges(model: ir.Model, rng: np.random.Generator, count: int = _GAUGES) -> Iterator[tuple[str, ir.Model]]:
    """Copies that compute the same: `count` random elements of the whole group, and the canonical form."""
    program = Program.of(model)
    for k in range(count):
        yield f"act {k}", program.act({space: space.random(rng) for space in program.spaces}).emit()
    yield "canonicalize", cipm_ir.optimize(model, ["canonicalize"], verify=False).program.emit()


def valid(mutant: Mutant, runner: Single, feeds: Feeds) -> bool:
    """Whether a structural edit left a model that runs and gives outputs of the same shapes."""
    try:
        outputs = Single(mutant.model).run(feeds)
    except Exception:
        return False
    expected = runner.run(feeds)
    return all(outputs[name].shape == expected[name].shape for name in expected)


def trials(
    name: str, count: int, seed: int, kinds: Sequence[str], check_caught: bool
) -> Iterator[Trial | tuple[str, Verification]]:
    """Edits of one model, and first the verdicts on its copies without an edit."""
    original = ir.from_proto(zoo.build(name))
    rng = np.random.default_rng([seed, len(name), *name.encode()])
    copies = list(gauges(original, rng))
    for gauge, copy in copies:
        yield gauge, verify_models(original, copy, seed=seed)
    runner = Single(original)
    feeds = probes(original, seed, runner)
    start = int(rng.integers(len(kinds)))
    for k in range(count):
        for attempt in range(_ATTEMPTS * len(kinds)):
            kind = kinds[(start + k + attempt // _ATTEMPTS) % len(kinds)]
            gauge, copy = copies[int(rng.integers(len(copies)))]
            mutant = mutate(copy, kind, rng)
            if mutant is None or (kind in STRUCTURAL and not valid(mutant, runner, feeds[0][1])):
                continue
            found = verify_models(original, mutant.model, seed=int(rng.integers(1 << 30)))
            missed = found.ok is not False
            measured = effect(original, copy, mutant.model, feeds) if missed or check_caught else None
            yield Trial(name, gauge, str(mutant), kind, found, measured)
            break


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print tables and the list of what was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="of edits over all models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default="", help="names, with commas; all small ones of the zoo otherwise")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--check-caught", action="store_true", help="measure the caught ones too")
    given = parser.parse_args(arguments)
    small = [*zoo.names("synthetic"), *zoo.names("graphs"), "resnet20"]
    names = given.models.split(",") if given.models else small
    start = time.perf_counter()
    done: list[Trial] = []
    alarms: list[str] = []
    unmoved = unverified = 0
    for place, name in enumerate(names):
        count = (place + 1) * given.count // len(names) - place * given.count // len(names)
        first = len(done)
        try:
            for one in trials(name, count, given.seed, given.kinds.split(","), given.check_caught):
                if isinstance(one, Trial):
                    done.append(one)
                    continue
                gauge, found = one
                unmoved += 1
                unverified += found.ok is None
                if found.ok is False:
                    alarms.append(f"{name} ({gauge}): {found}")
                    print(f"false alarm: {alarms[-1]}", file=sys.stderr, flush=True)
        except zoo.UnavailableError as error:
            print(f"{name}: {error}", file=sys.stderr)
        print(f"{name}: {len(done)} edits, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        for trial in done[first:]:
            if trial.verdict == "visible":
                print(f"visible: {trial}", file=sys.stderr, flush=True)
    _print(done, alarms, unmoved, unverified, time.perf_counter() - start)


def _print(done: list[Trial], alarms: list[str], unmoved: int, unverified: int, seconds: float) -> None:
    verdicts = sorted({trial.verdict for trial in done})
    print(f"\n| kind | edits | {' | '.join(verdicts)} |\n|---|---|{'---|' * len(verdicts)}")
    for kind in (*KINDS, "all"):
        counts = Counter(trial.verdict for trial in done if kind in (trial.kind, "all"))
        if counts:
            print(f"| {kind} | {counts.total()} | {' | '.join(str(counts[v]) for v in verdicts)} |")
    hidden = sum(trial.verdict in HIDDEN for trial in done)
    caught = sum(trial.found.ok is False for trial in done)
    print(
        f"\ncaught {caught} of {len(done)} ({caught / max(len(done), 1):.1%}); "
        f"of those that can be seen {caught / max(len(done) - hidden, 1):.2%}; "
        f"false alarms on {len(alarms)} of {unmoved} copies without an edit "
        f"({unverified} not verified); {seconds:.0f} s"
    )
    for alarm in alarms:
        print(f"false alarm: {alarm}")
    for verdict in ("visible", "unknown", "not verified", *(f"caught, {v}" for v in HIDDEN), *HIDDEN[1:]):
        for trial in sorted(
            (t for t in done if t.verdict == verdict), key=lambda t: -(t.effect.ratio if t.effect else 0)
        ):
            print(f"{verdict}: {trial}")
    for trial in (t for t in done if t.verdict == "equivalent"):
        print(f"equivalent: {trial.model}, {trial.edit}")


if __name__ == "__main__":
    main()
