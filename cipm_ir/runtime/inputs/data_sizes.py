"""Sizes of a model's dynamic dimensions, read off the data that it will run on."""

from __future__ import annotations

import onnx_ir as ir

from cipm_ir.ir.shapes import dynamic_sizes
from cipm_ir.runtime.inputs.generate import Data, batches


def data_sizes(model: ir.Model, data: Data | None) -> dict[str, int]:
    """Return sizes by name, from the first batch; first axes are left out, since costs are per sample.

    Raises: `InputError` for data that does not fit the model.
    """
    found = dynamic_sizes(model.graph)
    if data is None or all(axis == 0 for places in found.values() for _, axis in places):
        return {}
    feeds = next(iter(batches(data, model, 1)), {})
    sizes: dict[str, int] = {}
    for name, places in found.items():
        for value, axis in places:
            array = feeds.get(value.name or "")
            if array is not None and axis and axis < array.ndim:
                sizes.setdefault(name, int(array.shape[axis]))
    return sizes
