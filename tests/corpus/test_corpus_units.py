"""Hidden units of trained models, counted by hand from their layers, and what the analysis finds.

Each entry lists the widths of one model, layer by layer, and says what ties layers together and what fixes them. These
run wherever the models were fetched (`make corpus`), and are skipped elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir
import pytest
from tests.corpus import path_of
from tests.corpus.fetch import why_missing

import cipm_ir


def _u2netp() -> list[int]:
    """Return the widths of a U-Net whose eleven stages are U-Nets.

    A stage of depth d adds its first convolution to its last one (64 units, tied), and has d convolutions of 16 on the
    way down and d - 2 on the way up; the three stages that dilate instead have four and two. What they hand on is
    concatenated, so every convolution has units of its own. The seven maps at the end are outputs.
    """
    stages = [depth + depth - 2 for depth in (7, 6, 5, 4, 4, 5, 6, 7)] + [4 + 2] * 3
    return [64] * len(stages) + [16] * sum(stages)


BY_HAND = {
    # Eight convolutions and a linear layer, one behind the other; the four logits are the output.
    "orinet": [32, 32, 64, 64, 128, 128, 256, 256, 128],
    # Columns of two embeddings, side by side in front of three convolutions; ReduceMax over the three stacked results
    # ties their 64 channels to one another; then 32 hidden units in front of one output.
    "attacut": [32, 16, 64, 32],
    # Four convolutions, two dense layers. The 64 hidden units of each direction of the two GRUs are not free: their
    # initial state is an input of the model, whose order is the caller's.
    "aecmos": [32, 64, 64, 128, 64, 64],
    # Nineteen convolutions, one behind the other; the 96 channels of the twentieth are the output.
    "wake_embedding": [24] * 3 + [48] * 4 + [72] * 4 + [96] * 8,
    # A residual stream of 32 that seven blocks add to, and 32 inside each block. The pooled vector of 128 is an output.
    "signal_pair": [32] + [32] * 7,
    # One stream of 128 through the backbone and both heads: zero-padded skips give it 16, 16, 32 and 64 channels that
    # begin at different depths and never meet. Depthwise convolutions add no unit. Then a stream of 32 in each head.
    "face_mesh": [16, 16, 32, 64, 32, 32],
    # The Fourier transform is a convolution with a weight: 129 frequencies, real and imaginary part tied by the
    # magnitude; four convolutions. The LSTM's 128 units are not free: h and c are inputs and outputs.
    "silero_v6": [129, 128, 64, 64, 128],
    # The learned basis, tied to the mask that it is multiplied with. The 128 units of either cell are not free: their
    # states are inputs and outputs.
    "dtln_wave": [256],
    "u2netp": _u2netp(),
}


def found(name: str) -> Sequence[int]:
    """Return the sizes of all spaces of units of a model, or skip."""
    path = path_of(name)
    if not path.exists():
        pytest.skip(why_missing(name))
    program = cipm_ir.load(path)
    assert not program.opaque
    return [space.size for space in program.spaces]


@pytest.mark.parametrize("name", BY_HAND)
def test_units_are_those_counted_by_hand(name: str) -> None:
    assert Counter(found(name)) == Counter(BY_HAND[name])


def test_the_count_sees_a_layer_that_is_fixed() -> None:
    path = path_of("orinet")
    if not path.exists():
        pytest.skip(why_missing("orinet"))
    model = ir.load(path)
    # The 128 hidden units of the last layer but one are an output now.
    inner = next(node for node in reversed(list(model.graph)) if node.op_type == "Relu").outputs[0]
    model.graph.outputs.append(inner)
    sizes = Counter(space.size for space in cipm_ir.load(model).spaces)
    assert Counter(BY_HAND["orinet"]) - sizes == Counter([128])
