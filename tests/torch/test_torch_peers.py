"""Networks on which Torch-Pruning and rebasin crash or go wrong without a word: here each is right.

Three things are asked of each: an element on every space leaves the output; units that contribute nothing can be taken
out of the emitted module, and what is left computes the same; and half of the multiplications can go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.models.dead_units import Keep, distance, killed, random_keep, restricted  # noqa: E402
from tests.torch import torch_zoo  # noqa: E402
from tests.torch.torch_running import tensors_of  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.errors import SymmetryError  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

PEERS = {
    "fail_option_a": "the shortcut of the published CIFAR ResNet pads channels: not prunable as it is",
    "fail_channel_pad": "a pad of channels is taken for the identity on them",
    "fail_roll": "a roll of channels is taken for the identity on them",
    "fail_qkv_head_major": "the fused weight is cut in thirds, though its rows go head by head",
    "fail_qkv_index": "`qkv[0]` crashes",
    "fail_pixel_shuffle": "pixel shuffle crashes",
    "fail_pixel_shuffle_functional": "pixel shuffle crashes",
    "fail_channel_shuffle": "reshape, transpose, reshape crashes",
    "fail_grouped_view": "a view of channels as groups crashes",
    "fail_grouped_gate": "a view of channels as groups crashes",
    "fail_broadcast_mask": "a mask of one channel is tied to the channels that it covers",
    "fail_batch_norm": "running statistics stay where they were when channels are permuted",
    "fail_flatten": "C x H x W flattened: one channel is H x W columns of the next layer",
    "fail_flatten_view": "C x H x W flattened, and batch norm behind it",
}
"""What goes wrong elsewhere, by name in the zoo."""

NO_DEAD_UNITS = {
    "fail_grouped_view": "each channel loses the mean of its group, in which a dead one counts",
    "fail_grouped_gate": "the units of a group compete in a softmax, in which a dead one counts",
}
"""Where no single unit can contribute nothing."""

WITH_BLOCKS = ("fail_qkv_head_major", "fail_qkv_index", "fail_grouped_gate")
"""Whole heads, or the same place in every group, can go."""


@functools.cache
def case(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    found = torch_zoo.case(name)
    return found.build(), *found.inputs()


def program_of(name: str) -> Program:
    module, args, kwargs = case(name)
    return cipm_ir.load(module, args, kwargs)


def emitted(program: Program) -> Any:
    """The torch module that the program is written as."""
    return program.origin.emit(program.emit()).object  # type: ignore[union-attr]


def outputs(module: Any, name: str) -> list[Any]:
    _, args, kwargs = case(name)
    with torch.no_grad():
        return tensors_of(module.eval()(*args, **kwargs))


def some_units(program: Program, seed: int) -> Keep:
    """What stays where some units of every space may go; heads and groups stay."""
    rng = np.random.default_rng(seed)
    return possible(program, lambda: random_keep(program, rng, blocks=False))


def some_blocks(program: Program, seed: int) -> Keep:
    """What stays where some heads or groups go, each with all that it holds."""
    rng = np.random.default_rng(seed)
    found = [space for space in program.spaces if space.kind == "blocks"]
    return possible(program, lambda: {s: np.sort(rng.choice(s.size, s.size - 1, replace=False)) for s in found})


def possible(program: Program, draw: Callable[[], Keep]) -> Keep:
    """The first draw that drops something and leaves the rows of every view equally long."""
    for _ in range(50):
        keep = draw()
        try:
            program.restrict(keep)
        except SymmetryError:
            continue
        if any(len(index) < space.size for space, index in keep.items()):
            return keep
    raise AssertionError("nothing can be taken out")


@pytest.mark.parametrize("name", sorted(PEERS))
def test_a_random_element_on_all_spaces_leaves_the_output(name: str) -> None:
    program, rng = program_of(name), np.random.default_rng(3)
    moved = emitted(program.act({space: space.random(rng) for space in program.spaces}))
    before, after = case(name)[0].state_dict(), moved.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())
    assert distance(outputs(case(name)[0], name), outputs(moved, name)) <= 1e-5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(PEERS.keys() - NO_DEAD_UNITS.keys()))
def test_dead_units_can_be_taken_out(name: str, seed: int) -> None:
    program = program_of(name)
    check_removal(program, name, some_units(program, seed))


@pytest.mark.parametrize("name", sorted(WITH_BLOCKS))
def test_dead_heads_and_groups_can_be_taken_out(name: str) -> None:
    program = program_of(name)
    check_removal(program, name, some_blocks(program, 0))


def check_removal(program: Program, name: str, keep: Keep) -> None:
    dead = killed(program, keep)
    small = emitted(restricted(dead, keep))
    assert count(small) < count(case(name)[0])
    assert distance(outputs(case(name)[0], name), outputs(emitted(dead), name)) > 1e-2, "nothing was made dead"
    assert distance(outputs(emitted(dead), name), outputs(small, name)) <= 1e-5


@pytest.mark.parametrize("name", sorted(PEERS))
def test_half_of_the_multiplications_can_go(name: str) -> None:
    module, args, kwargs = case(name)
    result = cipm_ir.optimize(module, ["prune{macs=0.5}"], example_inputs=args, example_kwargs=kwargs)
    assert result.report.after.macs <= 0.5 * result.report.before.macs
    assert count(result.model) < count(module)
    assert [x.shape for x in outputs(module, name)] == [x.shape for x in outputs(result.model, name)]


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["fail_roll", "fail_channel_pad", "fail_qkv_head_major", "fail_flatten"])
def test_control_units_that_live_are_missed(name: str) -> None:
    """Taken out without being made dead first, the same units change the output: the comparison can fail."""
    program = program_of(name)
    small = emitted(restricted(program, some_units(program, 0)))
    assert distance(outputs(case(name)[0], name), outputs(small, name)) > 1e-2


def test_control_batch_norm_without_its_statistics_is_seen() -> None:
    """What a peer does, to permute weights and leave the running statistics, changes the output."""
    program, rng = program_of("fail_batch_norm"), np.random.default_rng(3)
    moved = emitted(program.act({space: space.random(rng) for space in program.spaces}))
    state, old = moved.state_dict(), case("fail_batch_norm")[0].state_dict()
    moved.load_state_dict({key: old[key] if "running" in key else value for key, value in state.items()})
    assert distance(outputs(case("fail_batch_norm")[0], "fail_batch_norm"), outputs(moved, "fail_batch_norm")) > 1e-3
