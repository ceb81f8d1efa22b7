"""Means with their standard errors. Numbers in, numbers out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "mean", "ratio"]

Array = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A number and its standard error (NaN where a single value tells of none)."""

    value: float
    standard_error: float


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike) -> Estimate:
    """The sum of ``sums`` [n] over that of ``counts`` [n], such as nats per token over sequences of several lengths.

    The error is that of a ratio of means of n independent pairs (the delta method). NaN where nothing is counted.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total = float(weights.sum())
    if total <= 0:
        return Estimate(math.nan, math.nan)
    value = float(values.sum() / total)
    if len(values) < 2:
        return Estimate(value, math.nan)
    spread = float((values - value * weights).std(ddof=1))
    return Estimate(value, spread * math.sqrt(len(values)) / total)


def mean(values: npt.ArrayLike) -> Estimate:
    """Of independent ``values`` [n]; NaN where there are none."""
    found = np.asarray(values, dtype=np.float64)
    return ratio(found, np.ones(len(found)))
