"""How many copies with one row 1% off the verification tells from the original, and whether it refuses right copies.

    python -m tests.benchmarks.detection [--nets NAME,...] [--rows 1] [--gauges 10] [--seed 0] [--folder DIR] [--act]

Small transformers, convolution nets and audio nets (`detection_nets`). In a copy one row of one tensor (one entry of
a vector) is 1% too large: `rows` copies for every float tensor of more than one entry. A copy in another gauge is a
random element of the model's whole group, or the result of an exact pass. With ``--act`` the edited copies are in
another gauge too. What is missed is measured in double precision: equivalent, below or near rounding, or visible.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from tests.benchmarks import detection_nets
from tests.oracles.double_precision import HIDDEN, effect, probes
from tests.oracles.mutations import mutate, weights

import cipm_ir
from cipm_ir.errors import CipmError
from cipm_ir.runtime.verification.verify import verify_models
from cipm_ir.symmetry.program import Program

_WRONG = "no false alarm, the copy is wrong:"
_EXACT = ("clean-up", "fold-batch-norm", "canonicalize", "expose", "equalize")


@dataclass(frozen=True)
class Found:
    """What the verification said of one copy: its name, whether it was told from the original, and why it was not."""

    copy: str
    told: bool | None
    why: str = ""


def other_gauges(model: ir.Model, count: int, seed: int) -> Iterator[tuple[str, ir.Model]]:
    """Copies that compute the same: random elements of the group, then the results of exact passes."""
    program = Program.of(model)
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        yield f"act {k}", program.act({space: space.random(rng) for space in program.spaces}).emit()
    for name in _EXACT:
        try:
            yield name, cipm_ir.optimize(model, [name], verify=False).program.emit()
        except CipmError as error:
            print(f"  {name} is refused: {error}")


def alarms(model: ir.Model, count: int, seed: int) -> list[Found]:
    """Verify right copies; each should be found equal. Double precision tells whether a refused one is right."""
    feeds = probes(model, seed)
    made = []
    for name, copy in other_gauges(model, count, seed):
        found = verify_models(model, copy, seed=seed)
        refused = None if found.ok is None else not found.ok
        why = str(found)
        if refused or name in _EXACT:
            measured = effect(model, model, copy, feeds)
            if measured.verdict == "visible":
                why = f"{_WRONG} {measured}; {found}"
        made.append(Found(name, refused, why))
    return made


def edits(model: ir.Model, rows: int, seed: int, act: bool) -> list[Found]:
    """Verify copies with one row 1% off; each should be found different, if the edit can be seen at all."""
    rng = np.random.default_rng(seed)
    feeds = probes(model, seed)
    program = Program.of(model)
    made = []
    for one in weights(model):
        for _ in range(rows if one.array.size > 1 else 0):
            base = program.act({space: space.random(rng) for space in program.spaces}).emit() if act else model
            mutant = mutate(base, "row", rng, one.name)
            if mutant is None:
                continue
            found = verify_models(model, mutant.model, seed=seed)
            why = "" if found.ok is False else str(effect(model, base, mutant.model, feeds))
            made.append(Found(str(mutant), None if found.ok is None else not found.ok, why))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print a table with one line for each net and the list of what was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(detection_nets.SPECS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--gauges", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cipm-detection-nets")
    parser.add_argument("--act", action="store_true", help="edit copies in another gauge")
    given = parser.parse_args(arguments)
    given.folder.mkdir(exist_ok=True)
    totals: Counter[tuple[str, int]] = Counter()
    missed, wrong = [], []
    print("| kind | net | caught | of | equivalent or near rounding | false alarms | of | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.nets.split(","):
        start = time.perf_counter()
        model = ir.from_proto(detection_nets.build(name, given.folder))
        same, edited = alarms(model, given.gauges, given.seed), edits(model, given.rows, given.seed, given.act)
        hidden = sum(one.told is not True and one.why.startswith(HIDDEN) for one in edited)
        caught = sum(one.told is True for one in edited)
        false = sum(one.told is True and not one.why.startswith(_WRONG) for one in same)
        kind = detection_nets.SPECS[name].kind
        line = caught, len(edited), hidden, false, len(same)
        print(f"| {kind} | {name} | {' | '.join(map(str, line))} | {time.perf_counter() - start:.1f} |", flush=True)
        for group in (kind, "all"):
            totals.update({(group, k): number for k, number in enumerate(line)})
        missed += [f"missed: {name}, {one.copy} [{one.why}]" for one in edited if one.told is not True]
        wrong += [f"false alarm: {name}, {one.copy}: {one.why}" for one in same if one.told or _WRONG in one.why]
        wrong += [f"not verified: {name}, {one.copy}: {one.why}" for one in same if one.told is None]
    for group in ("transformer", "convolution", "audio", "all"):
        print(f"| {group} | | {' | '.join(str(totals[group, k]) for k in range(5))} | |")
    print("\n".join([*wrong, *sorted(missed, key=lambda text: "equivalent" in text)]))


if __name__ == "__main__":
    main()
