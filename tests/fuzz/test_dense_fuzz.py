"""Random graphs: a matrix on every space that is said to admit one changes no output, in float64."""

from __future__ import annotations

import pytest
from tests.fuzz.fuzz_graphs import random_feeds, random_model
from tests.fuzz.test_fuzz import differs, finite
from tests.oracles.widening import run_widened
from tests.symmetry.test_dense_groups import dense_elements
from tests.symmetry.test_soundness import program_of

from cipm_ir.errors import CipmError
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

SEEDS = 60


def dense_spaces(program: Program) -> list[Space]:
    """The spaces that admit matrices; none of a graph that is refused."""
    try:
        return [space for space in program.spaces if space.dense]
    except CipmError:
        return []


@pytest.mark.parametrize("start", range(0, SEEDS, 20))
def test_matrices_change_nothing(start: int) -> None:
    tried = 0
    for seed in range(start, start + 20):
        model = random_model(seed)
        program = program_of(model)
        if not dense_spaces(program):
            continue
        feeds = random_feeds(model, seed)
        before = run_widened(model, feeds)
        if finite(before):
            tried += 1
            wrong = differs("a matrix", before, program.act(dense_elements(program, seed)), feeds)
            assert not wrong, f"seed {seed}: {wrong}"
    assert tried >= 5
