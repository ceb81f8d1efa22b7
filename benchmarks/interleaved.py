"""Interleaved timing: contestants run in rotation, so that a slow moment of the machine falls on all, with ratios per round."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["interleave", "quartiles", "ratio", "retain_freed_memory"]


def retain_freed_memory() -> None:
    """Restart the script with an allocator that retains freed memory (glibc's, on Linux).

    By default it returns large tensors to the system and allocates them page by page again, how often depends on the
    order of allocations, and the timing of a contestant of a millisecond depends mostly on that.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        tunables = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": tunables})


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    repeats: int,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time every contestant in every round, in an order that rotates.

    Args:
        contestants: functions to time, by name.
        rounds: number of rounds.
        repeats: calls per contestant and round.
        wait: called after the repeats; synchronizes a device.

    Returns:
        Seconds per call of each contestant, one number per round.
    """
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
    """Return the median over rounds of the ratio, and the standard error of its mean."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    return statistics.median(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5


def quartiles(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile over rounds of the ratio."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, base, strict=True)], n=4)
    return middle, low, high
