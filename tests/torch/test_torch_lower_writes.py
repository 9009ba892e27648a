"""Lowering of writes into parts of a tensor: the graph goes on with a new tensor."""

from __future__ import annotations

import operator
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from tests.torch.torch_running import largest_difference, run_both
from tests.torch.torch_shape_cases import Calls, Function, image, opaque
from torch import nn

from cipm_ir.frontends.torch.load import load_torch


# ---------------------------------------------------------------- writes into parts
def _column(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = x[:, 1]
    return y


def _rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, m.places[:2]] = x[:, :2]
    return y


def _masked(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[x > 0] = 0
    return y


def _several(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[0, ..., 1:3] = 7.0
    y[:, 1, :, -1] = x[:, 2, :, 0]
    y[1] = x[0, :1]
    y[:, :, m.places[:2]] = 1.0
    return y


PARTS: dict[str, Function] = {"column": _column, "rows": _rows, "mask": _masked, "several": _several}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", PARTS)
def test_writes_of_functional_programs(name: str) -> None:
    """Decompositions turn writes through views into slice_scatter, select_scatter and index_put."""
    module = Calls(PARTS[name])
    program = torch.export.export(module, (image(),)).run_decompositions({})
    capture = load_torch(program)
    assert opaque(capture) == []
    assert largest_difference(run_both(capture, module, (image(),), {})) == 0


ITEMS: dict[str, tuple[Any, Any]] = {
    "number": ((slice(None), 0), 2.5),
    "negative": ((slice(None), slice(None), -1), 1),
    "slices": ((slice(None), slice(1, 3), slice(0, -1)), 0.5),
    "ellipsis": ((..., slice(2, None)), 3.0),
    "nothing": ((slice(2, 2),), 3.0),
    "all": (slice(None), 3.0),
    "row": (1, torch.arange(20.0).reshape(4, 5)),
    "column": ((slice(None), 1), torch.arange(40.0).reshape(2, 4, 5)),
    "column of rows": ((slice(None), 1, slice(1, 3), 2), torch.arange(2.0)),
    "positions": (torch.tensor([1, 0]), torch.arange(5.0)),
    "inner positions": ((slice(None), torch.tensor([2, 0])), torch.arange(5.0)),
    "two positions": ((torch.tensor([1, 0]), torch.tensor([2, 0])), torch.arange(5.0)),
    "mask": (torch.tensor([True, False]), 4.0),
}


@pytest.mark.parametrize("name", ITEMS)
def test_setitem(name: str) -> None:
    """A graph as torch.compile hands it out: the write is a call of operator.setitem."""
    index, value = ITEMS[name]
    root = nn.Module()
    graph = torch.fx.Graph()

    def held(key: str, item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        root.register_buffer(key, item)
        return graph.get_attr(key)

    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2.0))
    items = index if isinstance(index, tuple) else (index,)
    given = tuple(held(f"index{k}", item) for k, item in enumerate(items))
    graph.call_function(operator.setitem, (y, given if isinstance(index, tuple) else given[0], held("value", value)))
    graph.output(graph.call_function(torch.neg, (y,)))
    module = torch.fx.GraphModule(root, graph)
    capture = load_torch(module, (image(),))
    assert opaque(capture) == []
    assert largest_difference(run_both(capture, module, (image(),), {})) == 0
