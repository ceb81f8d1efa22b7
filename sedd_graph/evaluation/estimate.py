"""Means and ratios of means, each with its standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "mean", "ratio"]


class Estimate(NamedTuple):
    """A number and its standard error, which is NaN for a single value."""

    value: float
    standard_error: float


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike) -> Estimate:
    """Return the sum of ``sums`` over the sum of ``counts``, such as nats per token of sequences of several lengths.

    Args:
        sums: float [n], independent.
        counts: float [n].

    Returns:
        The ratio and its standard error by the delta method; NaN where the counts add up to zero.
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
    """Return the mean of independent ``values``, float [n]; NaN where there are none."""
    found = np.asarray(values, dtype=np.float64)
    return ratio(found, np.ones(len(found)))
