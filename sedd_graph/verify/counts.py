"""Comparison of counts of random draws with a distribution by chi-square. Axis: s states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["chance_quantile", "chi"]

FEW = 5.0
"""Least expected count of a state; rarer ones are counted together."""


def chance_quantile(freedom: float) -> float:
    """Return the chi-square value that chance exceeds once in 10^7 tests, by Wilson and Hilferty's approximation.

    Args:
        freedom: Number of degrees of freedom.
    """
    third = 2 / (9 * freedom)
    return freedom * (1 - third + 5.2 * math.sqrt(third)) ** 3


def chi(found: Tensor, law: Tensor, *, rows: float) -> tuple[float, float]:
    """Return the chi-distance between observed and expected shares of states, and its limit under chance.

    The chi-distance is the square root of the sum over states of (found - law)^2 / law, where rare states are counted
    together. It is infinite if a state of probability 0 was drawn.

    Args:
        found: Observed shares of the states, or an estimate of them, float64 [s].
        law: Expected shares, float64 [s].
        rows: Number of independent draws from which ``found`` was computed. For an estimate with another variance, the
            number of draws whose shares would have that variance.

    Returns:
        The chi-distance; and the limit, which chance exceeds once in 10^7 tests (0 if the distance is infinite).
    """
    if bool((found[law <= 0] > 0).any()):
        return math.inf, 0.0
    few = law * rows < FEW
    off, expected = (torch.cat([v[~few], v[few].sum()[None]]) for v in (found - law, law))
    real = expected * rows > 0.5
    distance = float((off[real].square() / expected[real]).sum().sqrt())
    return distance, math.sqrt(chance_quantile(max(1, int(real.sum()) - 1)) / rows)
