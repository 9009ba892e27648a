"""How many multiply-accumulates a node costs, from the shapes of its operands alone.

A multiply-accumulate is one product of a sum of products: over a contracted axis, a window with weights, the steps of a
transform. Operators that only move, compare, scale, normalize or reduce entries have none: their entry says so (the
trait ``free``), or, without a label rule, `cipm_ir.ops.costs_free`. Any other operator is *uncounted*: never taken for
free.

Conventions. A convolution counts its padding's zeros. Masks (causal attention) save nothing. An einsum of more than two
operands is contracted from left to right, as onnxruntime does. A Fourier transform of N complex points counts
2 N ceil(log2 N) (N/2 log2 N butterflies of four real products), of N real points half of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array
from cipm_ir.ops.contraction import einsum_terms
from cipm_ir.ops.registry import lookup

Shape = tuple[int, ...]


class Uncounted(Exception):
    """A node whose multiply-accumulates are not known, with the reason."""


@dataclass
class Site:
    """One node with the concrete shapes of its inputs and outputs; ``None`` where a shape is not known.

    ``version``: of the operator set; ``numbers``: the values of small constant inputs.
    """

    node: ir.Node
    inputs: Sequence[Shape | None]
    outputs: Sequence[Shape | None]
    version: int = 0
    numbers: Sequence[Array | None] = ()

    def has(self, index: int) -> bool:
        """Whether the node has this input."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def input(self, index: int) -> Shape:
        """Shape of an input. Raises: `Uncounted`."""
        shape = self.inputs[index] if index < len(self.inputs) else None
        return self._known(shape, f"input {index}")

    def length(self, index: int, axis: int) -> int:
        """Size along an axis of an optional input, which may be empty; 0 where there is none. Raises: `Uncounted`."""
        if not self.has(index):
            return 0
        shape = self.inputs[index]
        if shape is None:
            raise Uncounted(f"the shape of input {index} is not known")
        return shape[axis]

    def output(self, index: int = 0) -> Shape:
        """Shape of an output. Raises: `Uncounted`."""
        return self._known(self.outputs[index], f"output {index}")

    def attr(self, name: str, default: Any = None) -> Any:
        """Value of an attribute of the node."""
        return attribute(self.node, name, default)

    def text(self, name: str, default: str = "") -> str:
        """Value of an attribute that is a text."""
        value = self.attr(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def number(self, index: int) -> int | None:
        """An input that is one known integer."""
        known = self.numbers[index] if index < len(self.numbers) else None
        return int(known.reshape(-1)[0]) if known is not None and known.size == 1 else None

    def _known(self, shape: Shape | None, what: str) -> Shape:
        if shape is None:
            raise Uncounted(f"the shape of {what} is not known")
        if any(size <= 0 for size in shape):
            raise Uncounted(f"the shape of {what} comes out as {list(shape)}")
        return shape


CostRule = Callable[[Site], int]

_RULES: dict[tuple[str, str], CostRule] = {}


def cost(*names: str, domain: str = "") -> Callable[[CostRule], CostRule]:
    """Register how operators are counted; registering one twice is an error."""

    def register(rule: CostRule) -> CostRule:
        for name in names:
            if (domain, name) in _RULES:
                raise ValueError(f"the cost of {domain}::{name} is registered twice")
            _RULES[domain, name] = rule
        return rule

    return register


def free(*names: str, domain: str = "") -> None:
    """Declare operators that have no multiply-accumulates."""
    cost(*names, domain=domain)(_nothing)


def _nothing(_site: Site) -> int:
    return 0


def is_free(node: ir.Node) -> bool:
    """Whether an operator is declared to have no multiply-accumulates, whatever its shapes."""
    return _rule(node) is _nothing


def macs_of(site: Site) -> int:
    """Multiply-accumulates of a node without subgraphs.

    Raises: `Uncounted` with the reason, where there is no rule or a shape is not known.
    """
    stated = site.node.metadata_props.get("macs")
    if stated is not None and site.node.domain == "pkg.torch":
        return _scaled(site, int(stated))
    rule = _rule(site.node)
    if rule is None:
        raise Uncounted(site.node.metadata_props.get("uncounted") or "there is no rule that counts this operator")
    try:
        return int(rule(site))
    except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise Uncounted(f"its shapes do not fit the operator ({error})") from error


def _scaled(site: Site, stated: int) -> int:
    """What a call in torch costs: as counted when it was read; where its shapes may change since, in proportion.

    ``entries``: of its first output when it was read, and of the product with a stack of matrices also of its inputs.
    """
    before = site.node.metadata_props.get("entries")
    if before is None or not site.outputs or site.outputs[0] is None:
        return stated
    now = math.prod(site.outputs[0])
    if "stacked" in site.node.attributes:
        now *= (site.inputs[0] or (0,))[-1]
    return stated * now // max(int(before), 1)


def _rule(node: ir.Node) -> CostRule | None:
    return rule_of(node.domain, node.op_type)


def rule_of(domain: str, name: str) -> CostRule | None:
    """Return how an operator is counted, None where nothing says so."""
    rule, entry = _RULES.get((domain, name)), lookup(domain, name)
    return _nothing if rule is None and entry is not None and entry.free else rule


# ---------------------------------------------------------------- products
@cost("MatMul", "MatMulInteger")
def matmul_macs(site: Site) -> int:
    """Entries of the output times the contracted length."""
    a, b = site.input(0), site.input(1)
    return product_macs(site.output(), a[-1], b)


def product_macs(out: Shape, length: int, right: Shape) -> int:
    """Entries of a matrix product times the contracted length, which the right operand must have too."""
    if right[-2 if len(right) > 1 else -1] != length:
        raise Uncounted(f"the contracted axes have {length} and {right[-2 if len(right) > 1 else -1]} entries")
    return math.prod(out) * length


@cost("QLinearMatMul")
def _qlinear_matmul(site: Site) -> int:
    return product_macs(site.output(), site.input(0)[-1], site.input(3))


@cost("Gemm")
def gemm_macs(site: Site) -> int:
    """M N K."""
    return math.prod(site.output()) * site.input(0)[0 if site.attr("transA", 0) else 1]


@cost("Conv", "ConvInteger")
def conv_macs(site: Site) -> int:
    """Entries of the output times taps times input channels of a group."""
    return _convolution(site, site.input(1))


@cost("QLinearConv")
def _qlinear_conv(site: Site) -> int:
    return _convolution(site, site.input(3))


def _convolution(site: Site, weight: Shape) -> int:
    """ONNX infers one output position where the kernel is larger than its input; no runtime computes that."""
    d = len(weight) - 2
    pads, dilations = site.attr("pads") or [0] * (2 * d), site.attr("dilations") or [1] * d
    if site.text("auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        for k, (size, taps) in enumerate(zip(site.input(0)[2:], weight[2:], strict=True)):
            if size + pads[k] + pads[k + d] < dilations[k] * (taps - 1) + 1:
                raise Uncounted(f"its kernel of {taps} does not fit into {size}")
    return math.prod(site.output()) * math.prod(weight[1:])


@cost("ConvTranspose")
def transpose_macs(site: Site) -> int:
    """Entries of the input times taps times output channels of a group."""
    return math.prod(site.input(0)) * math.prod(site.input(1)[1:])


@cost("DeformConv")
def _deform_conv(site: Site) -> int:
    """The convolution, and four products for each entry that is sampled between positions."""
    out, weight = site.output(), site.input(1)
    sampled = out[0] * math.prod(out[2:]) * site.input(0)[1] * math.prod(weight[2:])
    return math.prod(out) * math.prod(weight[1:]) + 4 * sampled


@cost("GridSample")
def grid_sample_macs(site: Site) -> int:
    """Two entries per axis and output entry (linear), four (cubic), or none (nearest)."""
    out, mode = site.output(), site.text("mode", "linear")
    taps = {"nearest": 0, "bilinear": 2, "linear": 2, "bicubic": 4, "cubic": 4}.get(mode)
    if taps is None:
        raise Uncounted(f"mode {mode!r} is not known")
    return int(math.prod(out) * taps ** (len(out) - 2))


@cost("Det")
def _det(site: Site) -> int:
    """Elimination: n^3 / 3 for each matrix."""
    *batch, n, _ = site.input(0)
    return math.prod(batch) * n**3 // 3


# ---------------------------------------------------------------- einsum
@cost("Einsum")
def einsum_macs(site: Site) -> int:
    """From left to right: the range of all letters of the two operands; what only one of them has is summed before."""
    shapes = [site.input(k) for k in range(len(site.node.inputs))]
    operands, out = einsum_terms(site.text("equation"), [len(s) for s in shapes])
    size: dict[str, int] = {}
    for letters, shape in zip(operands, shapes, strict=True):
        for x, n in zip(letters, shape, strict=True):
            size[x] = max(size.get(x, 1), n)
    total, here = 0, set(operands[0])
    for k, letters in enumerate(operands[1:], 1):
        later = {*out, *(x for o in operands[k + 1 :] for x in o)}
        other = set(letters)
        pair = {x for x in here | other if x in later or (x in here and x in other)}
        total += math.prod(size[x] for x in pair)
        here = pair & later
    return total


# ---------------------------------------------------------------- attention and recurrence
def attention_products(queries: int, outputs: int, keys: int) -> int:
    """Q K' and the product with V: entries of the queries and of the outputs, each times the number of keys."""
    return keys * (queries + outputs)


@cost("Attention")
def _attention(site: Site) -> int:
    keys = site.input(1)[-2] + site.length(4, 2)
    return attention_products(math.prod(site.input(0)), math.prod(site.output()), keys)


@cost("LSTM", "GRU", "RNN")
def recurrent_macs(site: Site) -> int:
    """Per step, item and direction: every gate row times inputs and hidden units."""
    steps, items = site.input(0)[:2]
    return steps * items * (math.prod(site.input(1)) + math.prod(site.input(2)))


# ---------------------------------------------------------------- transforms
def fourier_macs(transforms: int, length: int, *, real: bool) -> int:
    """Products of fast Fourier transforms of one length."""
    return transforms * length * math.ceil(math.log2(max(length, 2))) * (1 if real else 2)


@cost("DFT")
def _dft(site: Site) -> int:
    signal = site.input(0)
    axis = int(site.attr("axis", 1))
    if site.has(2):
        given = site.number(2)
        if given is None:
            raise Uncounted("the axis of the transform is not known")
        axis = given
    elif site.version >= 20:
        axis = -2
    length: int | None = signal[axis]
    if site.has(1):
        length = site.number(1)
    if length is None:
        raise Uncounted("the length of the transform is not known")
    transforms = math.prod(signal[:-1]) // max(signal[axis], 1)
    return fourier_macs(transforms, length, real=signal[-1] == 1)


@cost("STFT")
def _stft(site: Site) -> int:
    batch, frames, bins = site.output()[:3]
    length = site.input(2)[0] if site.has(2) else site.number(3)
    if length is None:
        length = 2 * (bins - 1) if site.attr("onesided", 1) else bins
    signal = site.input(0)
    return fourier_macs(batch * frames, length, real=len(signal) < 3 or signal[-1] == 1)


# ---------------------------------------------------------------- classical models
@cost("LinearClassifier", "LinearRegressor", domain="ai.onnx.ml")
def _linear(site: Site) -> int:
    shape = site.input(0)
    return (shape[0] if len(shape) > 1 else 1) * len(site.attr("coefficients", ()))


@cost("SVMClassifier", "SVMRegressor", domain="ai.onnx.ml")
def _support_vectors(site: Site) -> int:
    shape = site.input(0)
    rows = shape[0] if len(shape) > 1 else 1
    return rows * (len(site.attr("support_vectors", ())) + len(site.attr("coefficients", ())))
