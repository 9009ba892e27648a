"""Gradients of a loss without labels, by torch: what `cipm_ir.runtime.gradients` describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn
from torch.nn import functional

from cipm_ir.backends.torch.emitter import Emitter, needed_nodes
from cipm_ir.backends.torch.places import identifier
from cipm_ir.backends.torch.state import as_torch
from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.constants import attribute
from cipm_ir.runtime.activations.observe import samples
from cipm_ir.runtime.gradients import Loss, Products, Read
from cipm_ir.runtime.inputs.generate import Array, Data, Feeds, batches, true_inputs

_SAME = ("Identity", "Cast")
"""Operators that hand a prediction on as it is."""


class Tap(nn.Module):
    """Hands a value on and, when gradients come back, sums gradient times value for each read of it."""

    def __init__(self, reads: Sequence[tuple[int, Read]]) -> None:
        super().__init__()
        self.reads = list(reads)
        self.count = 1
        self.found: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same numbers; the first taps on each path are where derivatives end."""
        y = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        y.register_hook(lambda gradient: self._came(gradient, y.detach()))  # type: ignore[no-untyped-call]
        return y

    def _came(self, gradient: torch.Tensor, value: torch.Tensor) -> None:
        product = gradient.detach().float() * value.float()
        for k, read in self.reads:
            self.found[k] = _summed(product, read, self.count)


@dataclass
class Tapped:
    """A model in torch with a tap at each place that is looked at."""

    module: fx.GraphModule
    inputs: list[str]
    taps: list[Tap]
    outputs: list[ir.Value] = field(default_factory=list)

    def run(self, feeds: Feeds, count: int) -> list[torch.Tensor]:
        """Return the outputs, with the taps ready for gradients of ``count`` samples."""
        for tap in self.taps:
            tap.count = count
        made = self.module(*(as_torch(ir.tensor(np.ascontiguousarray(feeds[name]))) for name in self.inputs))
        return list(made) if isinstance(made, tuple | list) else [made]


def products(
    model: ir.Model,
    reads: Sequence[Read],
    data: Data,
    *,
    loss: Loss,
    draws: int = 1,
    size: int = 16,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[str, float | None], None] | None = None,
) -> Iterator[Products]:
    """Gradient times value at each read; see `cipm_ir.runtime.gradients.Gradients`."""
    tapped = tap_model(model, reads)
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for feeds in batches(data, model, size, limit=limit):
        count = samples(feeds)
        outputs = tapped.run(feeds, count)
        for draw in range(draws):
            value = _loss(tapped.outputs, outputs, loss, generator)
            if not torch.isfinite(value):
                raise InputError(
                    f"The outputs are NaN or infinite on samples {seen} to {seen + count - 1} of the data; "
                    "repair the model, or leave these samples out."
                )
            for tap in tapped.taps:
                tap.found = {}
            if value.requires_grad:
                value.backward(retain_graph=draw + 1 < draws)  # type: ignore[no-untyped-call]
            yield Products(count, _collected(tapped, reads, seen))
        seen += count
        if progress is not None:
            progress("gradients", None if limit is None else min(seen / limit, 1.0))
    if not seen:
        raise InputError("The data holds no samples.")


def tap_model(model: ir.Model, reads: Sequence[Read]) -> Tapped:
    """Return the model in torch, evaluating, no parameter requiring gradients, with a tap in front of every reading
    node.

    Raises:
        UnsupportedError: an operator has no counterpart in torch; the message names it.
    """
    at: dict[tuple[int, str], list[tuple[int, Read]]] = {}
    for k, read in enumerate(reads):
        at.setdefault((read.node, read.value), []).append((k, read))
    graph, root = fx.Graph(), nn.Module()
    names = [v.name or "" for v in true_inputs(model)]
    known = {name: graph.placeholder(f"{identifier(name)}_{k}") for k, name in enumerate(names)}
    emitter = Emitter(root, graph, model, known)
    taps: list[Tap] = []
    wanted = set(needed_nodes(model.graph))
    for position, node in enumerate(model.graph):
        if node not in wanted:
            continue
        given = {v.name or "": v for v in node.inputs if v is not None}
        plain = {name: emitter.value(v) for name, v in given.items() if (position, name) in at}
        for name, before in plain.items():
            taps.append(Tap(at[position, name]))
            emitter.known[name] = emitter.module(f"tap {len(taps)}", taps[-1], before)
        emitter.visit(node)
        emitter.known.update(plain)
    values = list(model.graph.outputs)
    graph.output(tuple(emitter.value(v) for v in values))
    graph.lint()
    module = fx.GraphModule(root, graph).eval().requires_grad_(False)
    return Tapped(module, names, taps, values)


def _summed(product: torch.Tensor, read: Read, count: int) -> torch.Tensor:
    """(samples, places along the axes of a read): the sum over everything else."""
    others = [a for a in range(product.ndim) if a not in read.axes and a != read.samples]
    lead = [] if read.samples is None else [read.samples]
    sizes = [product.shape[a] for a in (*lead, *read.axes)]
    flat = product.permute(*lead, *read.axes, *others).reshape(*sizes, -1).sum(-1)
    rows = 1 if read.samples is None or sizes[0] % count else count
    return flat.reshape(rows, -1, int(np.prod(sizes[len(lead) :]))).sum(1)


def _collected(tapped: Tapped, reads: Sequence[Read], seen: int) -> list[Array]:
    """Return the sums in the order of the reads; zeros where no gradient came."""
    found = {k: tensor for tap in tapped.taps for k, tensor in tap.found.items()}
    sums: list[Array] = []
    for k, read in enumerate(reads):
        made = found.get(k)
        sums.append(np.zeros((1, 1)) if made is None else made.double().numpy())
        if not np.isfinite(sums[-1]).all():
            raise InputError(
                f"The gradient at {read.value!r} is NaN or infinite on a batch that starts at sample {seen} of the "
                "data; repair the model, or leave these samples out."
            )
    return sums


# ---------------------------------------------------------------- losses
def _loss(
    values: Sequence[ir.Value], outputs: Sequence[torch.Tensor], loss: Loss, generator: torch.Generator
) -> torch.Tensor:
    """Return the sum over samples and outputs.

    Raises:
        UnsupportedError: no output is a tensor of real numbers.
    """
    smooth = [(v, y) for v, y in zip(values, outputs, strict=True) if y.is_floating_point()]
    if not smooth:
        raise UnsupportedError(
            "Gradients need an output of real numbers, and this model gives out none; let it give out its scores."
        )
    total = torch.zeros(())
    for v, y in smooth:
        total = total + (_drawn(v, y.float(), generator) if loss == "prediction" else _signed(y.float(), generator))
    return total


def _signed(y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1
    return (signs * y).sum()


def _drawn(value: ir.Value, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Σ ± √p · log p over the classes of the predictions that an output stands for, p held fixed.

    Its squared derivative is, in the mean over the signs, Σ p (∂ log p)²: as with labels drawn from p, without their
    noise. An output with one number for each sample is read as the mean of a normal distribution of variance 1.
    """
    maker, axis = _prediction(value, y)
    if y.ndim < 2:
        return _signed(y, generator)
    if maker == "Sigmoid" or y.shape[axis] == 1:
        p = (y if maker == "Sigmoid" else torch.sigmoid(y)).clamp(1e-7, 1 - 1e-7)
        scores = torch.stack([p.log(), torch.log1p(-p)])
    elif maker == "Softmax":
        scores = y.clamp_min(1e-12).log()
    else:
        scores = y if maker == "LogSoftmax" else functional.log_softmax(y, axis)
    return _signed((0.5 * scores.detach()).exp() * scores, generator)


def _prediction(value: ir.Value, y: torch.Tensor) -> tuple[str, int]:
    """Return what made an output (Softmax, LogSoftmax, Sigmoid, or nothing that is known), and the axis of its classes.

    Scores of images of three and more dimensions lie along axis 1, those of sequences along the last.
    """
    node = value.producer()
    while node is not None and node.op_type in _SAME and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type in ("Softmax", "LogSoftmax"):
        graph = node.graph
        opset = 13 if not isinstance(graph, ir.Graph) else graph.opset_imports.get("", 13)
        axis = int(attribute(node, "axis", 1 if opset < 13 else -1))
        return node.op_type, axis % y.ndim
    axis = 1 if y.ndim in (2, 4, 5) else y.ndim - 1
    return ("Sigmoid" if node is not None and node.op_type == "Sigmoid" else ""), axis
