"""Several spaces mixed at once, and weights set many times in one copy, are what one step after the other gives."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tests import zoo

import cipm_ir
from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.primitives.working_copy import WorkingCopy
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

MODELS = ["mlp_relu", "conv_flatten_gemm", "two_heads", "dense_block", "mlp_transposed_weight"]


def weights(program: Program) -> dict[str, NDArray[np.float64]]:
    """All parameters, evaluated."""
    held = program.emit().graph.initializers
    return {k: np.asarray(v.const_value.numpy(), np.float64) for k, v in held.items() if v.const_value is not None}


def mixable(program: Program) -> dict[Space, NDArray[np.float64]]:
    """A random mixing of every space that can take one."""
    rng, found = np.random.default_rng(0), {}
    for space in program.spaces:
        matrix = rng.normal(size=(space.size, space.size))
        try:
            program.mix({space: matrix})
        except SymmetryError:
            continue
        found[space] = matrix
    return found


@pytest.mark.parametrize("name", MODELS)
def test_mixing_at_once_is_mixing_one_by_one(name: str) -> None:
    """The structure is the same, so that the analysis is handed on."""
    program = cipm_ir.load(zoo.build(name))
    mixings = mixable(program)
    assert mixings
    at_once = program.mix(mixings)
    one_by_one = program
    for space, matrix in mixings.items():
        one_by_one = one_by_one.absorb(one_by_one.space(space.name), np.arange(space.size), matrix)
    assert at_once.analysis is program.analysis
    assert [(s.name, s.size) for s in at_once.spaces] == [(s.name, s.size) for s in one_by_one.spaces]
    found, wanted, before = weights(at_once), weights(one_by_one), weights(program)
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        np.testing.assert_allclose(found[key], array, rtol=1e-5, atol=1e-5 * np.abs(array).max())
    assert any(np.abs(found[key] - before[key]).max() > 1e-3 for key in before)  # a control: something was mixed


def test_mix_refuses_what_absorb_refuses() -> None:
    program = cipm_ir.load(zoo.build("softmax_hidden"))
    space = next(s for s in program.spaces if s.kind == "units")
    with pytest.raises(SymmetryError, match="softmax"):
        program.mix({space: np.eye(space.size)})


@pytest.mark.parametrize("name", ["mlp_relu", "local_function_twice"])
def test_a_working_copy_ends_as_refits_do(name: str) -> None:
    """Weights set twice, the last counts; neither the program nor an earlier result changes; functions are kept."""
    program, rng = cipm_ir.load(zoo.build(name)), np.random.default_rng(1)
    before = weights(program)
    names = [k for k, a in before.items() if a.ndim == 2][:2]
    steps = [{k: rng.normal(size=before[k].shape)} for k in [*names, names[0]]]
    work, wanted = WorkingCopy(program), program
    results = []
    for step in steps:
        work.refit(step)
        wanted = wanted.refit(step)
        results.append((work.result(), wanted))
    for made, one in results:
        assert all(np.array_equal(a, weights(one)[k]) for k, a in weights(made).items())
        assert len(made.emit().functions) == len(program.emit().functions)
    assert all(np.array_equal(a, before[k]) for k, a in weights(program).items())
    assert not np.array_equal(weights(results[0][0])[names[0]], weights(results[-1][0])[names[0]])
    with pytest.raises(SymmetryError, match="no parameter named"):
        work.refit({"nothing": np.zeros(1)})
    with pytest.raises(SymmetryError, match="shape"):
        work.refit({names[0]: np.zeros(3)})
