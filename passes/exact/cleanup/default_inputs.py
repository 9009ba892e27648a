"""Optional inputs that hold what an operator takes without them: an initial state of zeros."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.parameters import parameter_tensor

_STATES = {
    ("", "RNN"): (5,),
    ("", "GRU"): (5,),
    ("", "LSTM"): (5, 6),
    ("com.microsoft", "DynamicQuantizeLSTM"): (5, 6),
}
_MOVES = ("Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""What gives out entries of its first input and nothing else."""
_LIMIT = 1 << 16
"""Constants with more entries are not looked at."""


def drop_defaults(node: ir.Node) -> None:
    """Leave out the initial states that are zero (not -0) in every run, in place."""
    for index in _STATES.get((node.domain, node.op_type), ()):
        if index < len(node.inputs) and _is_zero(node.inputs[index]):
            node.replace_input_with(index, None)


def _is_zero(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in _MOVES and not maker.domain:
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "ConstantOfShape" and not maker.domain:
        tensor = attribute(maker, "value")
        if tensor is None:  # 0 of type float
            return True
    else:
        tensor = parameter_tensor(value)
    if tensor is None or tensor.size > _LIMIT:
        return False
    return not np.ascontiguousarray(tensor.numpy()).view(np.uint8).any()
