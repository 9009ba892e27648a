"""Spaces on which everything is linear: which are found, that another basis changes nothing, what goes first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests import zoo

import cipm_ir
from cipm_ir.passes.pruning.compress.candidates import find_candidates, mask_of
from cipm_ir.passes.pruning.refit.bilinear import change, diagonalize_bases, find_pairs, outputs_to_zero
from cipm_ir.passes.pruning.refit.layers import zero_outputs
from cipm_ir.runtime.inputs.generate import random_inputs
from cipm_ir.symmetry.program import Program


def loaded(name: str) -> tuple[Program, list[dict[str, NDArray[Any]]], set[int]]:
    """A model of the zoo, inputs for it, and all its spaces."""
    program = cipm_ir.load(zoo.build(name))
    rng = np.random.default_rng(0)
    data = [random_inputs(program.model, rng, 4) for _ in range(12)]
    return program, data, set(range(len(program.spaces)))


FOUND = {
    "attention_separate": (3, 3), "attention_qkv_major": (3, 3), "attention_flat_split": (3, 3),
    "attention_rope_table": (3, 0), "mlp_identity": (2, 0), "mlp_neg": (2, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FOUND))
def test_found_and_turned_without_a_trace(name: str) -> None:
    program, data, wanted = loaded(name)
    made, pairs = diagonalize_bases(program, wanted, data, size=8, limit=48, seed=0)
    chains = sum(pair.chain for pair in pairs.values())
    assert (chains, len(pairs) - chains) == FOUND[name]
    assert change(program, made, data) < 1e-10
    assert made is not program


@pytest.mark.parametrize("name", ["mlp_relu", "mlp_gelu", "attention_gqa"])
def test_others_are_left_alone(name: str) -> None:
    program, data, wanted = loaded(name)
    assert diagonalize_bases(program, wanted, data, size=8, limit=48, seed=0) == (program, {})


@pytest.mark.parametrize("name", ["mlp_abs", "mlp_square"])
def test_control_what_only_looks_linear_is_seen_through(name: str) -> None:
    """Signs and scales pass |h| and h², rotations do not: they are found by their group, and refused by the outputs."""
    program, data, wanted = loaded(name)
    assert find_pairs(program)
    assert diagonalize_bases(program, wanted, data, size=8, limit=48, seed=0) == (program, {})


def silenced(program: Program, which: int) -> Program:
    """Without one unit of each pair of queries and keys."""
    weights: dict[str, NDArray[Any]] = {}
    for pair in find_pairs(program).values():
        if not pair.chain:
            zero_outputs(program, pair.first, pair.left[which : which + 1 or None], weights)
    return program.refit(weights)


def test_the_last_unit_matters_least() -> None:
    program, data, wanted = loaded("attention_separate")
    made, _ = diagonalize_bases(program, wanted, data, size=8, limit=48, seed=0)
    costs = [change(program, silenced(made, k), data) for k in range(4)]
    before = [change(program, silenced(program, k), data) for k in range(4)]
    assert costs[3] < 0.3 * min(before) and costs[3] < 0.3 * costs[0]


def test_units_of_queries_and_keys_become_candidates() -> None:
    program, data, wanted = loaded("attention_separate")
    without, refused = find_candidates(program, wanted, 1, 1, 4)
    made, pairs = diagonalize_bases(program, wanted, data, size=8, limit=48, seed=0)
    candidates, notes = find_candidates(made, wanted, 1, 1, 4, pairs)
    new = [c for c in candidates if c.pairs]
    assert len(candidates) == len(without) + 1 and len(notes) == len(refused) - 1
    assert len(new) == 1 and len(new[0].pairs) == 3


def test_muted_are_units_that_go_but_not_their_heads() -> None:
    program, _, _ = loaded("attention_separate")
    pairs = find_pairs(program)
    first = next(k for k, pair in pairs.items() if not pair.chain)
    quiet = outputs_to_zero(program, pairs, mask_of(program, [(first, np.asarray([0, 1]))]))
    assert {node: len(places) for node, places in quiet.items()} == {
        pairs[first].first.reader.key: 2, pairs[first].second.reader.key: 2,
    }  # fmt: skip
    heads = next(k for k, s in enumerate(program.spaces) if s.kind == "blocks")
    assert outputs_to_zero(program, pairs, mask_of(program, [(heads, np.asarray([0]))])) == {}


def test_compress_drops_them() -> None:
    program, data, _ = loaded("attention_separate")
    result = cipm_ir.optimize(program.model, passes=["compress{params=0.8}"], data=data)
    assert result.program.parameters <= 0.8 * program.parameters
