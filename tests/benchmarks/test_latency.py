"""Latency: how well the table of `LatencyTable` foretells real seconds, and where fewer MACs do not save time.

Prints tables; asserts only that the estimates order the models. Needs CIPM_TEST_DATA for the trained ResNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from cipm_ir import api
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.latency import BLOCK, LatencyTable
from cipm_ir.passes.pruning.budget.latency_bench import kept
from cipm_ir.passes.pruning.budget.search import Choice, Search, allowed_levels, link_spaces, make_choice
from cipm_ir.runtime.timing import compare_latency, timing_feeds
from cipm_ir.symmetry.program import Program


def choices_of(program: Program, round_to: int = 1) -> list[Choice]:
    """Every space that may shrink, with random ranks: time does not depend on which units go."""
    rng = np.random.default_rng(0)
    links, made = link_spaces(program.analysis), []
    for group in links.groups:
        spaces = [program.spaces[k] for k in group]
        least, most = min(s.size for s in spaces), max(s.size for s in spaces)
        levels = allowed_levels(least, most, max(most // 8, 1), round_to if spaces[0].kind == "units" else 1)
        if spaces[0].kind != "cells" and len(levels) > 1 and links.frozen.isdisjoint(group):
            made.append(make_choice(program.analysis, group, [rng.random(s.size) for s in spaces], levels, local=False))
    return made


def nearest(choices: Sequence[Choice], numbers: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(np.argmin(np.abs(np.asarray(c.levels) - n))) for c, n in zip(choices, numbers, strict=True))


@pytest.mark.parametrize("batch", [1])
def test_the_table_against_real_seconds(batch: int, data_dir: Path) -> None:
    program = api.load(data_dir / "cifar10" / "resnet20.onnx")
    choices = choices_of(program)
    feeds = timing_feeds(program.model, batch=batch)
    table = LatencyTable.measure(program, choices, feeds, seconds=60.0)
    rng = np.random.default_rng(1)
    sizes = [int(c.levels[-1]) for c in choices]
    wanted = {f"all at {share:.0%}": nearest(choices, [share * n for n in sizes]) for share in (0.9, 0.7, 0.5, 0.3)}
    for k in range(6):
        drawn = [rng.uniform(0.3, 1.0) * n for n in sizes]
        wanted[f"random {k}"] = nearest(choices, drawn)
        wanted[f"random {k}, by {BLOCK}"] = nearest(choices, [BLOCK * np.ceil(n / BLOCK) for n in drawn])
    models = [program.restrict(kept(program, choices, levels)).emit() for levels in wanted.values()]
    real = compare_latency([program.emit(), *models], feeds, runs=40, noise=0.02, seconds=60.0)
    costs = CostModel(program)
    search = Search(program.analysis, choices, costs.macs)
    print(f"\nResNet-20: {table}")
    shares, estimates = [], []
    for (name, levels), seconds in zip(wanted.items(), real.seconds[1:], strict=True):
        shares.append(seconds / real.seconds[0])
        estimates.append(table.fraction(levels))
        macs = costs.macs(search.mask(levels)) / program.macs
        print(f"  {name:16s} MACs {macs:4.0%}  time {shares[-1]:4.0%}  estimate {estimates[-1]:4.0%}")
    rank = float(spearmanr(shares, estimates).statistic)
    off = np.abs(np.array(estimates) / np.array(shares) - 1)
    print(f"  rank correlation {rank:.2f}, error median {np.median(off):.1%}, largest {off.max():.1%}")
    assert rank > 0.7


@pytest.mark.parametrize("threads", [1, 2])
def test_where_fewer_macs_do_not_save_time(threads: int, data_dir: Path) -> None:
    path = data_dir / "cifar10" / "resnet20.onnx"
    passes = [f"prune{{macs={share}, round_to={by}}}" for share in (0.9, 0.7, 0.5, 0.3) for by in (1, 4, 8)]
    dense = api.load(path)
    made = [api.optimize(path, text, verify=False).program for text in passes]
    feeds = timing_feeds(dense.model, batch=1)
    took = compare_latency(
        [p.emit() for p in (dense, *made)], feeds, threads=threads, runs=40, noise=0.02, seconds=60.0
    )
    print(f"\nResNet-20, magnitude pruning: dense {took.seconds[0] * 1e3:.3g} ms; {took}")
    for text, program, seconds in zip(passes, made, took.seconds[1:], strict=True):
        print(f"  {text:34s} MACs {program.macs / dense.macs:4.0%}  time {seconds / took.seconds[0]:4.0%}")
    assert max(took.seconds) < 10
