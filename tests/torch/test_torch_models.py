"""Every model of the torch zoo: read, acted on, pruned, run, trained, and loaded again."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.torch import torch_zoo  # noqa: E402
from tests.torch.torch_running import tensors_of  # noqa: E402
from tests.torch.torch_zoo import built, program  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.errors import SymmetryError, UnsupportedError  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

NOT_TO_HALF = {
    "fail_roll_residual": "every channel is tied to its neighbour: one orbit",
    "local_response_norm": "neighbouring channels are mixed",
    "bad_sort": "the units are sorted",
    "complex_parameters": "complex numbers are not followed",
    "complex_linear": "complex numbers are not followed",
    "fail_channel_shuffle_module": "groups of two channels",
    "units_sliced": "77% is the least: few of its units are free",
}
NO_SPACES = {
    "fail_roll_residual",
    "local_response_norm",
    "bad_sort",
    "complex_parameters",
    "complex_linear",
    "adaptive_max_pool",
    "max_pool_indices",
    "nested_outputs",
    "keyword_only_input",
}
"""Models in which nothing may move: an operator without a rule reads every hidden unit, or the units are outputs."""

FLOAT32_INSIDE = {"llama", "llama_cache", "llama_cache_tensors", "qwen2", "mixtral_batched"}
"""Their normalizations compute in float32 whatever the type of the model."""

REFUSED = {
    "torch_transformer_decoder_guess": "control flow depends on data",
    "mixtral_eager": "control flow depends on data",
    "bad_control_flow": "control flow depends on data",
    "bad_data_size": "a size depends on data",
    "bad_numpy": "it leaves torch",
    "sparse_adjacency": "a sparse tensor",
}
"""What `load` refuses; the messages are tested with the other bad input."""

NO_FLOAT64 = {
    "mixtral": "grouped_mm has no float64 kernel",
    "complex_linear": "its dtype is fixed",
    "quantized_weight": "its dtype is fixed",
}
NAMES = [name for name in torch_zoo.names() if name not in REFUSED]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_read_is_refused(name: str) -> None:
    module, args, kwargs = built(name)
    with pytest.raises(UnsupportedError):
        cipm_ir.load(module, args, kwargs)


def acted(source: Program, seed: int = 1) -> Program:
    rng = np.random.default_rng(seed)
    return source.act({space: space.random(rng) for space in source.spaces})


def change(source: Program, other: Program, *, mixed: bool = False) -> float:
    """The largest relative change of an output on the example inputs and random ones; on others it is rounding.

    ``mixed``: the program computes in a lower precision than its weights have, which shows no rounding of theirs.
    """
    verifier: Any = source.origin.verifier  # type: ignore[union-attr]
    model = source.emit()
    found = verifier(model).check(other.emit())
    assert found.ok or mixed, found.reason
    return float(verifier(model, cases=2).check(other.emit()).max_rel)


@pytest.mark.parametrize("name", NAMES)
def test_a_random_element_of_the_full_group_changes_nothing(name: str) -> None:
    source = program(name)
    assert bool(source.spaces) != (name in NO_SPACES)
    assert change(source, acted(source)) <= 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_FLOAT64])
def test_in_float64_it_is_exact_up_to_rounding(name: str) -> None:
    module, args, kwargs = copy.deepcopy(built(name))
    module, args, kwargs = module.double(), _double(args), _double(kwargs)
    source = cipm_ir.load(module, args, kwargs)
    assert [s.size for s in source.spaces] == [s.size for s in program(name).spaces]
    mixed = name in FLOAT32_INSIDE
    assert change(source, acted(source, seed=2), mixed=mixed) <= (1e-6 if mixed else 1e-10)


def _double(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_macs_can_go(name: str) -> None:
    module, args, kwargs = built(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    source = program(name)
    if name in NOT_TO_HALF or name in NO_SPACES:
        with pytest.raises(SymmetryError, match="cannot come down"):
            cipm_ir.optimize(source, ["prune{macs=0.5}"])
        return
    result = cipm_ir.optimize(source, ["prune{macs=0.5}"])
    assert result.report.after.macs <= 0.5 * result.report.before.macs * (1 + 1e-9)
    with torch.no_grad():
        wanted, got = tensors_of(copy.deepcopy(module)(*args, **kwargs)), tensors_of(result.model(*args, **kwargs))
    assert [a.shape for a in wanted] == [a.shape for a in got]
    assert all(np.isfinite(a).all() for a in got if a.dtype.kind == "f")
    _trains(module, result.model, args, kwargs)
    _loads_again(source, result, args, kwargs)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "the caller's module was changed"


def _trains(module: Any, small: Any, args: Any, kwargs: Any) -> None:
    """One training step: finite loss, a gradient for each parameter that has one in the original."""
    with_gradient = {}
    for key, one in (("original", copy.deepcopy(module)), ("small", copy.deepcopy(small))):
        one.train(module.training)
        outputs = [x for x in torch.utils._pytree.tree_leaves(one(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        loss = sum(x.float().square().mean() for x in outputs if x.is_floating_point())
        assert torch.isfinite(loss)
        loss.backward()
        with_gradient[key] = {n for n, p in _parameters(one) if p.grad is not None}
        assert all(torch.isfinite(p.grad).all() for p in one.parameters() if p.grad is not None)
        torch.optim.SGD(one.parameters(), lr=1e-3).step()
    assert with_gradient["small"] == with_gradient["original"] & {n for n, _ in _parameters(small)}
    assert with_gradient["small"]


def _parameters(module: Any) -> Any:
    return module.named_parameters(remove_duplicate=False)


def _loads_again(source: Program, result: Any, args: Any, kwargs: Any) -> None:
    other = copy.deepcopy(result.model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        other.load_state_dict(result.model.state_dict())
        wanted, got = tensors_of(result.model(*args, **kwargs)), tensors_of(other(*args, **kwargs))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(wanted, got, strict=True))
    names = {name for name in result.model.state_dict() if not name.startswith("_tensor_constant")}
    module = source.origin.capture.source  # type: ignore[union-attr]
    assert names <= {*module.state_dict(), *(name for name, _ in module.named_buffers())}


def test_control_a_wrong_element_is_seen() -> None:
    """Acting on one tensor less changes the output: the comparison above can fail."""
    source = program("mlp_relu")
    other = acted(source)
    name = next(iter(source.origin.capture.parameters))  # type: ignore[union-attr]
    model = other.emit()
    model.graph.initializers[name].const_value = source.emit().graph.initializers[name].const_value
    found = source.origin.compare(source.emit(), model)  # type: ignore[union-attr]
    assert not found.ok and found.max_rel > 1e-3
