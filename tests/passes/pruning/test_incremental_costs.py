"""Masks and costs that are updated where a level changes are those that are computed from the start."""

from __future__ import annotations

import numpy as np
import pytest
from tests import zoo

import cipm_ir
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.compress.candidates import Candidate, LevelMask, mask_of
from cipm_ir.symmetry.program import Program

MODELS = ["attention_separate", "grouped_conv", "residual_blocks", "siamese", "if_capture", "attention_gqa"]


def candidates(program: Program, rng: np.random.Generator) -> list[Candidate]:
    """One for each space, with random elements at some levels; blocks and the units in them may both lose some."""
    found = []
    for k, space in enumerate(program.spaces):
        levels = np.unique([1, (space.size + 1) // 2, space.size])
        kept = [[np.sort(rng.permutation(space.size)[:n])] for n in levels]
        found.append(Candidate([k], [[]], levels, levels, kept=kept))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_updates_equal_fresh_computations(name: str) -> None:
    """Along a random walk over levels; each step may change several candidates, back and forth."""
    program, rng = cipm_ir.load(zoo.build(name)), np.random.default_rng(0)
    choices = candidates(program, rng)
    mask, costs = LevelMask(program, choices), CostModel(program)
    levels = [len(c.levels) - 1 for c in choices]
    seen = set()
    for _ in range(12):
        for k in rng.choice(len(choices), size=min(2, len(choices)), replace=False):
            levels[k] = int(rng.integers(len(choices[k].levels)))
        kept = [
            (c.spaces[0], c.kept[level][0])
            for c, level in zip(choices, levels, strict=True)
            if level + 1 < len(c.levels)
        ]
        wanted = mask_of(program, kept)
        found = mask.at(levels)
        assert np.array_equal(found, wanted)
        fresh = CostModel(program)
        numbers = [[model.macs(found), model.params(found), model.bytes(found)] for model in (costs, fresh)]
        assert numbers[0] == numbers[1]
        seen.add(tuple(numbers[0]))
    assert len(seen) > 1  # a control: the steps cost different amounts


def test_a_cost_that_cannot_be_counted_does_not_spoil_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the middle of an update: later sums are computed from the start."""
    program = cipm_ir.load(zoo.build("residual_blocks"))
    costs, whole = CostModel(program), np.ones(program.analysis.classes.count, bool)
    first = costs.macs(whole)
    half = mask_of(program, [(0, np.arange(1))])
    wanted, count, calls = CostModel(program).macs(half), CostModel._node_macs, iter(range(100))

    def failing(self: CostModel, *args: object) -> int:
        if next(calls) == 1:
            raise ValueError("not counted")
        return count(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="not counted"):
        patched.setattr(CostModel, "_node_macs", failing)
        costs.macs(half)
    assert costs.macs(half) == wanted != first == costs.macs(whole)
