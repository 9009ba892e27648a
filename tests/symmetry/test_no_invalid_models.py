"""Pruning never makes an invalid model, and removing units that do nothing changes nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests import zoo
from tests.models.dead_units import Keep, distance, killed, outputs, program_of, random_keep, restricted

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.symmetry.program import Program

SMALL = zoo.names("synthetic")
REAL = [n for n in zoo.names(without=("large", "constant", "synthetic")) if n != "densenet121"]
SLOW = ["densenet121", "resnet50"]
# What is pinned is more than half of these: their hidden layer is read in a fixed order.
OUT_OF_REACH = {("gather_dynamic", 0.5), ("gated_by_input", 0.5), ("topk_hidden", 0.5)}
UNCOUNTED = {"custom_op"}
# A row of zeros divided by its own norm is not a number: dead units are not well defined there.
DEAD = [n for n in SMALL if n != "mlp_weight_norm"]
BUDGETS = (0.7, 0.5)


def pruned(program: Program, budget: float) -> PassResult:
    return Prune(macs=budget).run(program, Context())


def check(name: str, budget: float) -> None:
    program = program_of(name)
    if not any(s.kind == "units" for s in program.spaces):
        pytest.skip("nothing in this model is free")
    if name in UNCOUNTED:  # what the unknown operator costs could be anything: another budget will do
        with pytest.raises(SymmetryError, match="RampUp 'rampup_9': there is no rule that counts this operator"):
            pruned(program, budget)
        result = Prune(params=budget).run(program, Context())
        assert result.changed and result.program.parameters <= budget * program.parameters
        return
    if (name, budget) in OUT_OF_REACH:
        with pytest.raises(SymmetryError, match=r"cannot come down to 0\.5 of the multiply-accumulates"):
            pruned(program, budget)
        return
    result = pruned(program, budget)
    after = result.program
    assert result.metrics["macs"] == [program.macs, after.macs]
    assert result.metrics["params"] == [program.parameters, after.parameters]
    assert after.macs <= budget * program.macs
    model = ir.to_proto(after.emit())
    onnx.checker.check_model(model, full_check=True)
    sizes = [{}, {"N": 3, "batch": 3}] if _dynamic(model) else [{}]
    for dims in sizes:
        made, before = outputs(after, name, **dims), outputs(program, name, **dims)
        assert [x.shape for x in made] == [x.shape for x in before]
        assert all(np.isfinite(x).all() for x in made)


def _dynamic(model: onnx.ModelProto) -> bool:
    return any(d.dim_param in ("N", "batch") for v in model.graph.input for d in v.type.tensor_type.shape.dim)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", [*SMALL, *REAL])
def test_valid_after_pruning(name: str, budget: float) -> None:
    check(name, budget)


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SLOW)
def test_valid_after_pruning_large(name: str, budget: float) -> None:
    check(name, budget)


@pytest.mark.parametrize("name", [n for n in REAL if not {"faint", "quantized"} & zoo.entry(n).tags])
def test_budget_is_used(name: str) -> None:
    """Real networks come within two percent of the budget."""
    program = program_of(name)
    after, before = pruned(program, 0.5).metrics["macs"][1], program.macs
    assert 0.48 * before < after <= 0.5 * before


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", DEAD)
def test_dead_units_are_not_missed(name: str, seed: int) -> None:
    program = program_of(name)
    keep = random_keep(program, np.random.default_rng(seed))
    if not keep:
        pytest.skip("every space that may shrink is normalized: a zero is not the same as nothing there")
    dead = killed(program, keep)
    assert distance(outputs(dead, name), outputs(restricted(dead, keep), name)) < _tolerance(name)


@pytest.mark.parametrize("name", ["resnet20", "resnet_bottleneck", "bert", "vit", "llama_gqa", "shufflenet"])
def test_dead_units_of_real_networks(name: str) -> None:
    program = program_of(name)
    # a group of ShuffleNet cannot go alone: the grids between its groups of 8 and 9 would become uneven
    keep = random_keep(program, np.random.default_rng(0), blocks=name != "shufflenet")
    dead = killed(program, keep)
    assert distance(outputs(dead, name), outputs(restricted(dead, keep), name)) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_units_keep_their_order(seed: int) -> None:
    """Rows of a channel shuffle that keep different columns: the kept units arrive in another order than before."""
    program = program_of("channel_shuffle")
    shuffled = [s for s in program.spaces if s.size == 2 and "w_5[0]" in s.members]
    assert len(shuffled) == 9
    rng = np.random.default_rng(seed)
    keep = {s: rng.integers(0, 2, 1) for s in shuffled}
    dead = killed(program, keep)
    assert distance(outputs(dead, "channel_shuffle"), outputs(restricted(dead, keep), "channel_shuffle")) < 1e-6


def _tolerance(name: str) -> float:
    return 2e-3 if "float16" in zoo.entry(name).tags else 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "conv_flatten_gemm",
        "pad_channels",
        "roll_channels",
        "roll_add",
        "pixel_shuffle_dcr",
        "pixel_shuffle_crd",
        "channel_shuffle",
        "grouped_conv",
        "attention_qkv_major",
        "attention_head_major",
        "attention_gqa",
        "concat_self",
        "broadcast_mask_conv",
    ],
)
def test_living_units_are_missed(name: str) -> None:
    """Negative control: the same removal from a model in which the units do something."""
    program = program_of(name)
    keep = random_keep(program, np.random.default_rng(0))
    assert distance(outputs(program, name), outputs(restricted(program, keep), name)) > 1e-2
    dead = killed(program, keep)
    assert distance(outputs(program, name), outputs(dead, name)) > 1e-2


def test_uneven_groups_are_refused() -> None:
    """Negative control for the checks of the primitive: groups of a convolution with unequal numbers of outputs."""
    program = program_of("grouped_conv")
    names = [s.name for s in program.spaces if s.kind == "units" and s.size == 4]
    for numbers in ((2, 3, 4), (2, 3, 3)):
        keep = {program.space(n): np.arange(k) for n, k in zip(names, numbers, strict=True)}
        with pytest.raises(SymmetryError, match="equally many"):
            program.restrict(keep)


@pytest.mark.parametrize("seed", [0, 1, 6, 14, 51, 125])
def test_groups_and_channels_together_keep_their_order(seed: int) -> None:
    """Groups of a channel shuffle go as wholes, down to one, where the grouped convolutions become plain ones."""
    program, rng = program_of("channel_shuffle"), np.random.default_rng(seed)
    number = {"w_5": int(rng.integers(1, 3)), "w_1": int(rng.integers(1, 3)), "w_14": int(rng.integers(1, 4))}
    keep: Keep = {}
    for space in program.spaces:
        size = int(rng.integers(1, 4)) if space.kind == "blocks" else number[space.name.partition("#")[0]]
        keep[space] = np.sort(rng.choice(space.size, size, replace=False))
    small = program.restrict(keep)
    assert distance(outputs(killed(program, keep), "channel_shuffle"), outputs(small, "channel_shuffle")) < 1e-6
