"""Powers of two and signs change no bit of a torch MLP, whatever its activation, in torch and in onnxruntime."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.benchmarks.bit_exact_table import Outputs, changed, largest_delta, random_gauge  # noqa: E402
from tests.torch import torch_zoo  # noqa: E402
from tests.torch.torch_running import feeds_of, tensors_of  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.frontends.torch.load import load_torch  # noqa: E402
from cipm_ir.passes.exact.canonicalize.canonicalize_signs import CanonicalizeSigns  # noqa: E402
from cipm_ir.passes.exact.equalize.equalize import Equalize  # noqa: E402
from cipm_ir.runtime.session import Runner  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

NAMES = torch_zoo.names("mlp")
SCALED = {"mlp_relu", "mlp_leaky_relu", "mlp_prelu", "mlp_identity", "mlp_dropout"}
SIGNED = {"mlp_tanh", "mlp_softsign", "mlp_hardtanh_odd", "mlp_identity", "mlp_softshrink", "mlp_tanhshrink"}


def in_torch(module: Any, program: Program, args: Any, kwargs: Any) -> Outputs:
    """Outputs of the caller's own module, holding the weights of a program."""
    own = copy.deepcopy(module)
    own.load_state_dict(cipm_ir.optimize(program, [], verify=False).model.state_dict())
    with torch.no_grad():
        return tensors_of(own(*args, **kwargs))


def in_onnxruntime(program: Program, feeds: dict[str, Any]) -> Outputs:
    with Runner(program.model) as runner:
        return list(runner.run(feeds).values())


@pytest.mark.parametrize("name", NAMES)
def test_an_mlp_with_each_activation(name: str) -> None:
    case = torch_zoo.case(name)
    module, (args, kwargs) = case.build(), case.inputs()
    program = cipm_ir.load(module, args, kwargs)
    feeds = feeds_of(load_torch(module, args, kwargs), args, kwargs)
    if name in SCALED:
        assert all(space.group.scales for space in program.spaces)
    if name in SIGNED:
        assert all(space.group.signs for space in program.spaces)
    wanted = in_torch(module, program, args, kwargs), in_onnxruntime(program, feeds)
    moved = [random_gauge(program), *(changed(program, one)[0] for one in (Equalize(), CanonicalizeSigns()))]
    for other in moved:
        assert largest_delta(wanted[0], in_torch(module, other, args, kwargs)) == 0.0
        assert largest_delta(wanted[1], in_onnxruntime(other, feeds)) == 0.0


def test_the_weights_of_the_program_reach_the_module() -> None:
    """Negative control: other weights give other outputs."""
    case = torch_zoo.case("mlp_relu")
    module, (args, kwargs) = case.build(), case.inputs()
    program = cipm_ir.load(module, args, kwargs)
    name, value = next((n, v) for n, v in program.model.graph.initializers.items() if v.const_value is not None)
    assert value.const_value is not None
    other = program.refit({name: 2 * np.asarray(value.const_value.numpy())})
    wanted, got = (in_torch(module, one, args, kwargs) for one in (program, other))
    assert largest_delta(wanted, got) > 0
