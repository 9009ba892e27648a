"""Exact passes are undone: every unit comes back to its place, bit for bit where nothing rounded."""

from __future__ import annotations

import numpy as np
import pytest
from tests import zoo
from tests.models.dead_units import distance, outputs, program_of
from tests.models.fold_planted import array_of

import cipm_ir
from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.program import Program

NAMES = ["mlp_relu", "mlp_tanh", "residual_blocks", "two_heads", "gated_mlp", "grouped_conv"]


def weights(program: Program) -> dict[str, bytes]:
    return {name: array_of(program, name).tobytes() for name in program.model.graph.initializers}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_passes_is_undone_bit_for_bit(name: str) -> None:
    program = program_of(name)
    result = cipm_ir.optimize(program, ["cluster", "canonicalize", "equalize", "canonicalize-signs"], verify=False)
    assert weights(result.program) != weights(program)
    assert weights(result.undo()) == weights(program)
    assert distance(outputs(result.undo(), name), outputs(program, name)) == 0


@pytest.mark.parametrize("name", ["mlp_relu", "two_heads", "gated_mlp"])
def test_rewrites_between_stay_and_the_units_come_back(name: str) -> None:
    program = program_of(name)
    plain = cipm_ir.optimize(program, ["clean-up", "fold-affine"], verify=False).program
    result = cipm_ir.optimize(program, ["canonicalize", "clean-up", "fold-affine"], verify=False)
    back = result.undo()
    for key in back.model.graph.initializers.keys() & plain.model.graph.initializers.keys():
        a, b = array_of(back, key), array_of(plain, key)
        assert a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6), key


def test_scales_that_are_no_powers_of_two_come_back_up_to_rounding() -> None:
    program = program_of("mlp_relu")
    result = cipm_ir.optimize(program, ["canonicalize{exact=false}"], verify=False)
    back = result.undo()
    for name in program.model.graph.initializers:
        assert np.allclose(array_of(back, name), array_of(program, name), rtol=1e-6)


@pytest.mark.parametrize("one", ["prune{params=0.7}", "recover-names"])
def test_what_cannot_be_undone_is_named(one: str) -> None:
    result = cipm_ir.optimize(program_of("mlp_relu"), ["canonicalize", one], verify=False)
    if not result.report.steps[1].changed:
        assert weights(result.undo()) == weights(program_of("mlp_relu"))
        return
    with pytest.raises(SymmetryError, match=one.partition("{")[0] + ".* cannot be undone"):
        result.undo()


def test_a_rewrite_that_changes_the_group_is_named() -> None:
    result = cipm_ir.optimize(program_of("residual_blocks"), ["canonicalize", "fold-affine"], verify=False)
    assert all(step.changed for step in result.report.steps)
    with pytest.raises(SymmetryError, match="no longer admits"):
        result.undo()


def test_control_without_the_inverse_nothing_comes_back() -> None:
    program = program_of("mlp_relu")
    result = cipm_ir.optimize(program, ["canonicalize"], verify=False)
    again = result.program.act(
        {result.program.space(name): element for name, element in result.witness[0].elements.items()}
    )
    assert weights(again) != weights(program) and zoo.entry("mlp_relu")


def test_spaces_with_another_name_by_now_are_found_by_their_place() -> None:
    """Weights that ConstantOfShape made are parameters once units were moved, and name their space."""
    program = program_of("constant_of_shape_weights")
    result = cipm_ir.optimize(program, ["canonicalize"], verify=False)
    (one,) = result.witness
    assert not set(one.elements) <= {space.name for space in result.program.spaces}
    back, name = result.undo(), "constant_of_shape_weights"
    assert distance(outputs(back, name), outputs(program, name)) < 1e-6
    for weight in program.model.graph.initializers.keys() & back.model.graph.initializers.keys():
        assert array_of(back, weight).tobytes() == array_of(program, weight).tobytes()
