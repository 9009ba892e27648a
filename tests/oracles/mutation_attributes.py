"""Other values for the attributes of a node, which leave shapes as they are where that can be seen from the node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import onnx
import onnx_ir as ir

Change: TypeAlias = tuple[str, Any, Any]
"""Name of the attribute, its old value, its new one."""

_FACTOR = 1.1


def _number(value: float) -> Iterator[float]:
    yield value * _FACTOR if value else 0.1


def _epsilon(value: float) -> Iterator[float]:
    yield value * 10
    yield value / 10


def _flag(value: int) -> Iterator[int]:
    yield 1 - value


def _axis(value: int) -> Iterator[int]:
    yield from (axis for axis in (0, 1, 2, -1) if axis != value)


def _axes(value: list[int]) -> Iterator[list[int]]:
    if len(value) == 1:
        yield from ([axis] for axis in _axis(value[0]))


def _order(value: list[int]) -> Iterator[list[int]]:
    for k in range(len(value) - 1):
        yield [*value[:k], value[k + 1], value[k], *value[k + 2 :]]


def _pads(value: list[int]) -> Iterator[list[int]]:
    """One step from the beginning of an axis to its end, so that sizes stay."""
    half = len(value) // 2
    for k in range(half):
        if value[k] > 0:
            moved = list(value)
            moved[k] -= 1
            moved[half + k] += 1
            yield moved


def _whole(value: int) -> Iterator[int]:
    yield value + 1
    if value > 1:
        yield value - 1


def _each(value: list[int]) -> Iterator[list[int]]:
    """One of several sizes (strides, dilations) changed: valid where the result has the same shape by chance."""
    for k in range(len(value)):
        yield [*value[:k], value[k] + 1, *value[k + 1 :]]


_TEXTS = {
    "SAME_UPPER": "SAME_LOWER",
    "SAME_LOWER": "SAME_UPPER",
    "none": "tanh",
    "tanh": "none",
    "forward": "reverse",
    "reverse": "forward",
    "DCR": "CRD",
    "CRD": "DCR",
    "nearest": "linear",
    "linear": "nearest",
    "cubic": "linear",
    "half_pixel": "asymmetric",
    "pytorch_half_pixel": "align_corners",
    "align_corners": "half_pixel",
    "asymmetric": "half_pixel",
    "round_prefer_floor": "ceil",
    "floor": "ceil",
    "ceil": "floor",
    "constant": "edge",
    "edge": "reflect",
    "reflect": "edge",
    "bilinear": "nearest",
}


def _text(value: str) -> Iterator[str]:
    if value in _TEXTS:
        yield _TEXTS[value]


_OTHERS: dict[str, Callable[[Any], Iterator[Any]]] = {
    "epsilon": _epsilon,
    "alpha": _number,
    "beta": _number,
    "gamma": _number,
    "bias": _number,
    "lambd": _number,
    "scale": _number,
    "softcap": _number,
    "coordinate_transformation_mode": _text,
    "nearest_mode": _text,
    "mode": _text,
    "approximate": _text,
    "auto_pad": _text,
    "direction": _text,
    "axis": _axis,
    "axes": _axes,
    "perm": _order,
    "pads": _pads,
    "strides": _each,
    "dilations": _each,
    "count_include_pad": _flag,
    "transA": _flag,
    "transB": _flag,
    "linear_before_reset": _flag,
    "exclusive": _flag,
    "reverse": _flag,
    "largest": _flag,
    "select_last_index": _flag,
    "is_causal": _flag,
    "interleaved": _flag,
    "p": _whole,
    "size": _whole,
    "group": _whole,
    "num_heads": _whole,
    "q_num_heads": _whole,
}


def other_values(node: ir.Node) -> Iterator[Change]:
    """Every change of one attribute of a node, those included that only have their default."""
    if node.domain not in ("", "ai.onnx"):
        return
    values = {name: attribute.value for name, attribute in node.attributes.items() if not attribute.is_ref()}
    version = node.version or (node.graph.opset_imports.get("", 20) if node.graph is not None else 20)
    try:
        known = onnx.defs.get_schema(node.op_type, version, "").attributes
    except onnx.defs.SchemaError:
        known = {}
    for name, attribute in known.items():
        if name not in values and attribute.default_value.name and not (node.op_type == "Conv" and name == "auto_pad"):
            values[name] = onnx.helper.get_attribute_value(attribute.default_value)
    for name, value in values.items():
        if name not in _OTHERS:
            continue
        old = value.decode() if isinstance(value, bytes) else (list(value) if isinstance(value, tuple) else value)
        for new in _OTHERS[name](old):
            yield name, old, new
