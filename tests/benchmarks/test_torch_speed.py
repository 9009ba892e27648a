"""Speed on torch models against Torch-Pruning in the same run. Prints tables; asserts only that the work was done.

Both start from the same module with random weights, in evaluation mode; they take turns, and times are the shortest of
several runs, as the machine may do other things. The peer (Torch-Pruning 1.6) is used as its examples for these models
do: the output layer ignored, the heads of attention named (Llama: whole heads removed), everything else as it is by
default. Its constructor builds the dependency graph, which needs a forward run with autograd on real numbers; its
``step`` ranks and removes channels of one module, so it gets a fresh copy each time, which is not timed. Its ratio is
one of channels: 0.29, which leaves half of the multiply-accumulates; the table says how many each left.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from inspect import isgeneratorfunction
from typing import Any

import pytest

import cipm_ir
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.passes.framework.pipeline import run_passes

torch = pytest.importorskip("torch", reason="torch is not installed")
tp = pytest.importorskip("torch_pruning", reason="Torch-Pruning, the peer, is not installed: pip install torch-pruning")

from tests.benchmarks import torch_models  # noqa: E402
from tests.benchmarks.torch_models import Case  # noqa: E402

THREADS = 2
REPEATS = 5
PRUNES = 2
CHANNELS = 0.29

Cell = str | float


def in_turn(times: int, *runs: Callable[[], object]) -> tuple[list[float], list[Any]]:
    """Shortest of several runs of each, in seconds, and the last results.

    Other load on the machine meets all of them alike, as they take turns. A run that needs something made afresh each
    time is a generator: what it does up to its first ``yield`` is not timed.
    """
    best = [float("inf")] * len(runs)
    made: list[Any] = [None] * len(runs)
    for _ in range(times):
        for k, run in enumerate(runs):
            made[k] = None
            prepared: Any = run() if isgeneratorfunction(run) else None
            if prepared is not None:
                next(prepared)
            gc.collect()
            start = time.perf_counter()
            made[k] = run() if prepared is None else next(prepared)
            best[k] = min(best[k], time.perf_counter() - start)
    return best, made


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, list[list[Cell]]]]:
    """Rows by table, printed in the end."""
    found: dict[str, list[list[Cell]]] = {"analysis": [], "pruning": []}
    yield found
    show(
        "Lower and analyse, seconds",
        ["model", "units", "Torch-Pruning", "traced", "times", "exported", "times", "own part", "times"],
        found["analysis"],
    )
    print("  goals: 5 times where the model can be traced, 10 times for our own part after torch.export")
    show(
        "Prune to half of the multiply-accumulates, seconds",
        ["model", "step", "left", "pass", "times", "and module", "times", "left"],
        found["pruning"],
    )
    print("  goal: faster than its step")


def show(title: str, head: list[str], rows: list[list[Cell]]) -> None:
    """Print a table."""
    text = [head, *([c if isinstance(c, str) else f"{c:.3g}" for c in row] for row in rows)]
    widths = [max(len(line[k]) for line in text) for k in range(len(head))]
    print(f"\n{title}")
    for line in text:
        print(
            "  "
            + "  ".join(
                cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


def pruner(case: Case) -> Any:
    """The peer's pruner of a model; its containers are given, as its defaults would be shared by all models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.pruner.MagnitudePruner(
            case.module, case.inputs[0], importance=tp.importance.MagnitudeImportance(), pruning_ratio=CHANNELS,
            ignored_layers=case.ignored, num_heads=dict(case.heads), in_channel_groups={}, out_channel_groups={},
            prune_num_heads=case.whole_heads, prune_head_dims=not case.whole_heads, head_pruning_ratio=CHANNELS,
        )  # fmt: skip


def macs_left(case: Case, step: Any) -> float:
    """Fraction of multiply-accumulates that the peer's step left, by its own count.

    Attention modules hold the size of a head as a number, which the peer's examples set by hand.
    """
    for module in case.module.modules():
        query: Any = getattr(module, "query", None) or getattr(module, "q_proj", None)
        for name in ("head_dim", "attention_head_size"):
            if query in step.num_heads and hasattr(module, name):
                setattr(module, name, query.out_features // step.num_heads[query])
    return float(tp.utils.count_ops_and_params(case.module, case.inputs[0])[0])


def spaces_of(*source: Any) -> cipm_ir.Program:
    """A model lowered and analysed."""
    program = cipm_ir.load(*source)
    assert program.spaces
    return program


@pytest.mark.parametrize("name", list(torch_models.CASES))
def test_lower_and_analyse(name: str, rows: dict[str, list[list[Cell]]]) -> None:
    case = torch_models.build(name)
    exported = torch.export.export(case.module, case.inputs, strict=False)
    (theirs, traced, own), (_, program, again) = in_turn(
        REPEATS, lambda: pruner(case), lambda: spaces_of(case.module, case.inputs), lambda: spaces_of(exported)
    )
    units = sum(s.size for s in program.spaces if s.kind == "units")
    assert (program.origin.capture.method == "symbolic") == case.traces
    assert units == sum(s.size for s in again.spaces if s.kind == "units") > 3000
    whole: list[Cell] = [traced, theirs / traced]
    dash: list[Cell] = ["-", "-"]
    columns = [*whole, *dash] if case.traces else [*dash, *whole]
    rows["analysis"].append([name, f"{units}", theirs, *columns, own, theirs / own])


@pytest.mark.parametrize("name", list(torch_models.CASES))
def test_prune(name: str, rows: dict[str, list[list[Cell]]]) -> None:
    case = torch_models.build(name)
    program = spaces_of(case.module, case.inputs)
    todo = parse_passes(["prune{macs=0.5}"])
    before = float(tp.utils.count_ops_and_params(case.module, case.inputs[0])[0])

    def step() -> Iterator[Any]:
        twin = copy.deepcopy(case)
        stepped = pruner(twin)
        yield None
        stepped.step()
        yield twin, stepped

    (theirs, passed, whole), ((twin, stepped), outcome, result) = in_turn(
        PRUNES,
        step,
        lambda: run_passes(program, todo, verify=False),
        lambda: cipm_ir.optimize(program, todo, verify=False).model,
    )
    assert isinstance(result, torch.nn.Module)
    left = outcome.program.macs / program.macs
    assert 0.4 < left <= 0.5
    after = macs_left(twin, stepped) / before
    rows["pruning"].append([name, theirs, after, passed, theirs / passed, whole, theirs / whole, left])
