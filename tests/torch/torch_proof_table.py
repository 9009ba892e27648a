"""What every torch test model comes out as, and the proof: ``python -m tests.torch.torch_proof_table [names]``.

Each model is put into a random gauge, and pruned to half of its multiplications. What comes out is a class where it is
proven to be the verified program (`cipm_ir.backends.torch.proof`), and runs beside that program on inputs that
nobody chose for it: several magnitudes, zeros, ones. The largest difference is relative to the largest value of the
channel that it is in.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.torch import torch_zoo
from torch.utils import _pytree as pytree

import cipm_ir
from cipm_ir.errors import CipmError

HEADER = ("model", "read by", "gauge", "pruned", "largest difference", "seconds to write", "reason")
MACS = 0.5


@dataclass
class Row:
    """One model; ``error`` where it could not be read or changed."""

    name: str
    read: str = ""
    gauge: str = ""
    pruned: str = ""
    difference: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    error: str = ""

    def cells(self) -> list[str]:
        """The cells of the row, in the order of `HEADER`."""
        said = " ".join((self.error or self.reason).split()).replace("|", "/")
        numbers = [f"{self.difference:.1e}", f"{self.seconds:.2f}"]
        return [self.name, self.read, self.gauge, self.pruned, *numbers, said[:200]]


def measure(name: str) -> Row:
    """Read a model of the zoo, change it in two ways, and look at what is handed back."""
    row = Row(name)
    try:
        _fill(row)
    except CipmError as error:
        row.error = f"{type(error).__name__}: {error}"
    return row


def _fill(row: Row) -> None:
    found = torch_zoo.case(row.name)
    module, (args, kwargs) = found.build(), found.inputs()
    program = cipm_ir.load(module, args, kwargs)
    origin: Any = program.origin
    row.read = origin.capture.method
    rng = np.random.default_rng(0)
    acted = program.act({space: space.random(rng) for space in program.spaces})
    row.gauge = _written(row, acted)
    row.pruned = _written(row, cipm_ir.optimize(program, [f"prune{{macs={MACS}}}"], verify=False).program)


def _written(row: Row, program: Any) -> str:
    origin, model = program.origin, program.emit()
    start = time.perf_counter()
    emitted = origin.emit(model)
    row.seconds += time.perf_counter() - start
    row.reason = row.reason or emitted.reason
    row.difference = max(row.difference, largest_difference(origin, model, emitted.object))
    proof = getattr(emitted, "proof", "")
    return f"{emitted.form} ({proof})" if proof else emitted.form


def largest_difference(origin: Any, model: Any, made: Any) -> float:
    """The largest difference between what was handed back and the program, in any channel on any input."""
    graph, worst = origin.graph(model), 0.0
    modes = {m: m.training for m in made.modules()}
    made.eval()
    for args, kwargs in inputs_like(origin.capture.args):
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        feeds = {name: x.numpy() for name, x in zip(origin.capture.inputs, tensors, strict=True)}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                wanted = [torch.from_numpy(np.asarray(x)) for x in origin.run(graph, feeds).values()]
            except CipmError:
                continue  # an index that the model does not have, a size that it does not take
            torch.manual_seed(0)
            worst = max([worst, *map(_apart, wanted, _tensors(made(*args, **kwargs)))])
    for m, mode in modes.items():
        m.training = mode
    return worst


def inputs_like(example: Any) -> list[Any]:
    """The example, and others of its shapes: floats of magnitudes 0.001 to 1000, zeros and ones; integers likewise."""
    found = [pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, example)]
    for seed, scale in enumerate((1.0, 1e-3, 1e3, 0.0, None)):
        generator = torch.Generator().manual_seed(seed)

        def drawn(x: Any, scale: Any = scale, generator: Any = generator) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if scale is None or scale == 0.0:
                return torch.full_like(x, 0 if scale == 0.0 else 1)
            if x.is_floating_point():
                return (scale * torch.randn(x.shape, generator=generator)).to(x.dtype)
            return x.flatten()[torch.randperm(x.numel(), generator=generator)].reshape(x.shape)

        found.append(pytree.tree_map(drawn, example))
    return found


def _tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    if not a.numel() or not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
    size = a.abs().flatten(0, -2).amax(0) if a.ndim > 1 else a.abs()
    return float(((a - b).abs() / size.clamp_min(1e-30)).max())


def table(rows: list[Row]) -> str:
    """The rows as a markdown table, and a summary."""
    lines = [HEADER, tuple("---" for _ in HEADER), *(row.cells() for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    counts = [f"{what}: {_counted(getattr(row, what) for row in rows)}" for what in ("gauge", "pruned")]
    worst = max(rows, key=lambda row: row.difference)
    seconds = sum(row.seconds for row in rows)
    return f"{text}\n\n{'; '.join(counts)}; largest difference {worst.difference:.1e} ({worst.name}); {seconds:.0f} s"


def _counted(words: Any) -> str:
    return ", ".join(f"{n} {word or 'nothing'}" for word, n in Counter(words).most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="models of tests/torch/torch_zoo.py; without: all")
    names = parser.parse_args().names or torch_zoo.names()
    logging.disable(logging.WARNING)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            rows.append(measure(name))
            print(name, rows[-1].cells()[1:], file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
