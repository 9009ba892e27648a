"""Short names for people: exporters write whole paths, of which the end is usually enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return for each name its shortest end, cut at slashes, that no other of the names ends with."""
    parts = {name: name.split("/") for name in dict.fromkeys(names)}
    ends = Counter("/".join(p[k:]) for p in parts.values() for k in range(len(p)))
    return {
        name: next(end for k in range(len(p) - 1, -1, -1) if (end := "/".join(p[k:])) and (ends[end] == 1 or k == 0))
        for name, p in parts.items()
    }


def repeats(keys: Sequence[str], *, least: int = 4, most: int = 400) -> list[tuple[int, int, int]]:
    """Return where a row repeats itself: (start, length of the block, times), first and longest runs first.

    Blocks have at least ``least`` entries, and at most ``most``; they do not overlap.
    """
    found, at = [], 0
    same: dict[int, list[int]] = {}
    for period in range(least, min(most, len(keys) // 2) + 1):
        run, lengths = 0, [0] * len(keys)
        for k in range(len(keys) - period - 1, -1, -1):
            run = run + 1 if keys[k] == keys[k + period] else 0
            lengths[k] = run
        if max(lengths) >= period:
            same[period] = lengths
    while at < len(keys):
        best = max(
            (((lengths[at] // period + 1) * period, -period) for period, lengths in same.items()), default=(0, 0)
        )
        covered, period = best[0], -best[1]
        if period and covered >= 2 * period:
            found.append((at, period, covered // period))
            at += covered
        else:
            at += 1
    return found
