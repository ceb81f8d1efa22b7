"""Contestants that take turns, so that a slow moment of the machine falls on all of them, and the ratios of every round."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["keep_memory", "quartiles", "ratio", "take_turns"]


def keep_memory() -> None:
    """Start the script again with an allocator that keeps what was freed (glibc's, on Linux).

    Otherwise it hands large tensors back to the system and gets them anew, page by page, as often as the order of
    allocations happens to make it: what is timed then depends on that more than on a contestant of a millisecond.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        tunables = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": tunables})


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: int,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that each takes for one call, one number a round; the order rotates. ``wait`` ends what runs on a device."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for number in range(rounds):
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            start = time.perf_counter()
            for _ in range(repeats):
                contestants[name]()
            wait()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Median over rounds of the ratio, and the standard error of its mean."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5


def quartiles(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles over rounds of the ratio."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, base, strict=True)], n=4)
    return middle, low, high
