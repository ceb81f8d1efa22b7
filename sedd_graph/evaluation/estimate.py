"""Estimators of a mean and of a ratio of two means, each with its standard error."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Estimate", "mean", "ratio"]


class Estimate(NamedTuple):
    """Estimate of a mean or a ratio, with its standard error, which is NaN for a single sample."""

    value: float
    standard_error: float


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike) -> Estimate:
    """Return sum(``sums``) / sum(``counts``), such as the mean nats per token of sequences of different lengths.

    Args:
        sums: float [n], a total for each of n independent samples, such as the nats of a sequence.
        counts: float [n], the number of units of each sample, such as the tokens of a sequence.

    Returns:
        The ratio and its standard error by the delta method. Both are NaN if the counts add up to zero.
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
    """Return the mean and standard error of independent ``values``, float [n]. Both are NaN if n = 0."""
    found = np.asarray(values, dtype=np.float64)
    return ratio(found, np.ones(len(found)))
