"""Tests of random draws against exact probabilities, at a level that sound draws with any seed never reach.

Axes: r draws, s states, b rows, l positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.verify.worst import least

__all__ = ["NEVER", "binomial_tail", "chi_square", "correlated", "dispersed", "shifted"]

NEVER = 1e-12
"""Probability below which a deviation is no chance: checks run with fixed seeds, some hundreds for each process."""
_COUNT = 20.0
"""Least expected count of a cell."""


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the probability that chance alone gives a larger chi-square statistic.

    Args:
        counts: Observed counts, float64 [...], of any shape.
        expected: Expected counts, of the same shape. Cells expected less than 20 times are taken together, those
            expected never must stay empty.

    Returns:
        The upper tail of the chi-square distribution; 0 if a cell of expectation 0 was seen.
    """
    counts, expected = counts.reshape(-1).double(), expected.reshape(-1).double()
    if bool((counts[expected <= 1e-12] > 0).any()) or not bool((counts + expected).isfinite().all()):
        return 0.0
    counts, expected = _lumped(counts, expected)
    rare, tail = expected < _COUNT / 2, 1.0
    if bool((seen := rare & (counts > 0)).any()):  # the upper tails of Poisson counts
        tail = least(float(rare.sum() * torch.special.gammainc(counts[seen], expected[seen]).min()))
    counts, expected = counts[~rare], expected[~rare]
    if len(counts) < 2:
        return tail
    value = ((counts - expected).square() / expected).sum()
    half = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return least(tail, float(torch.special.gammaincc(half, value / 2)))


def _lumped(counts: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Merge neighbouring cells that are expected less than 20 times; few of the merged cells are expected less than 10 times."""
    small = expected < _COUNT
    cell = (expected[small].cumsum(0) / _COUNT).long()
    cells = int(cell.max()) + 1 if len(cell) else 0
    counts, expected = (
        torch.cat([v[~small], torch.zeros(cells, dtype=torch.float64).index_add_(0, cell, v[small])])
        for v in (counts, expected)
    )
    return counts[expected > 0], expected[expected > 0]


def binomial_tail(counts: Tensor, trials: Tensor, chance: Tensor) -> float:
    """Return the probability that chance gives a deviation as large as the largest of these binomial counts.

    Args:
        counts: Numbers of successes, [...].
        trials: Numbers of trials, of the same shape.
        chance: Probabilities of success, of the same shape. Cells of variance below 20 are left out.

    Returns:
        A bound on the two-sided probability, by the normal distribution, times the number of cells.
    """
    counts, trials, chance = (v.double().reshape(-1) for v in torch.broadcast_tensors(counts, trials, chance))
    spread = trials * chance * (1 - chance)
    kept = ~(spread < _COUNT)  # NaN is kept, and fails
    if not bool(kept.any()):
        return 1.0
    score = ((counts - trials * chance).abs() - 0.5)[kept] / spread[kept].sqrt()
    return least(float(kept.sum()) * math.erfc(float(score.max()) / math.sqrt(2)))


def shifted(counts: Tensor, trials: Tensor, chance: Tensor, slope: Tensor) -> float:
    """Return the p-value of a score test of binomial counts against a change of one parameter, such as total noise.

    Args:
        counts: Numbers of successes, [...].
        trials: Numbers of trials, of the same shape.
        chance: Probabilities of success under the hypothesis, of the same shape.
        slope: Derivatives of these probabilities with respect to the parameter, up to a common factor, of the same
            shape.

    Returns:
        The two-sided p-value, by the normal distribution; 1 if no probability depends on the parameter.
    """
    counts, trials, chance, slope = (v.double() for v in (counts, trials, chance, slope))
    spread = chance * (1 - chance)
    weight = torch.where(spread <= 1e-6, 0.0, slope / spread.clamp(min=1e-6))
    size = float((weight.square() * trials * spread).sum().sqrt())
    total = abs(float((weight * (counts - trials * chance)).sum()))
    return least(math.erfc(total / size / math.sqrt(2))) if size != 0 else 1.0


def dispersed(hits: Tensor, chance: float) -> float:
    """Test 0/1 draws for independence by the variance of their sums, and return a p-value.

    Two sets of sums are tested: those over rows, one for each position, and those over positions, one for each row.
    Both too large and too small a variance count as deviations.

    Args:
        hits: Draws of 0 or 1, float64 [b, l].
        chance: Probability of 1.

    Returns:
        The smaller of the two-sided p-values of the two chi-square tests, at most 1.
    """
    worst = 1.0
    draws = (hits - chance) / math.sqrt(chance * (1 - chance))
    for axis in (0, 1):
        sums = draws.sum(axis) / math.sqrt(draws.shape[axis])
        half = torch.tensor(len(sums) / 2, dtype=torch.float64)
        value = sums.square().sum() / 2
        worst = least(
            worst, 2 * float(torch.special.gammaincc(half, value)), 2 * float(torch.special.gammainc(half, value))
        )
    return worst


def correlated(hits: Tensor, chance: float) -> float:
    """Return a bound on the probability that chance gives as many, or as few, common 1s of any two rows or positions.

    Args:
        hits: Independent draws of 0 or 1, float64 [b, l].
        chance: Probability of 1.
    """
    worst, both = 1.0, chance**2
    for table in (hits, hits.T):
        rows, length = table.shape
        common = (table @ table.T)[~torch.eye(rows, dtype=torch.bool)] / length
        for share in (common.max(), common.min()):
            # the bound of Chernoff: exp(-length KL(share || both))
            divergence = torch.xlogy(share, share / both) + torch.xlogy(1 - share, (1 - share) / (1 - both))
            worst = least(worst, rows * rows * math.exp(-length * float(divergence)))
    return worst
