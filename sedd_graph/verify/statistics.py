"""Tests of random draws against exact probabilities: the one home of the statistics of the proofs.

All chi-square tests group rare cells in one way (:func:`chi_square`). Their result is a probability by chance; the same
as a number of standard deviations of a normal variable (:func:`deviation`), where it is corrected for another error; or
a distance between distributions, with its limit under chance (:func:`chi_distance`), where it is compared with a bias.

Axes: r draws, s states, b rows, l positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.verify.worst import least

__all__ = [
    "NEVER",
    "ONCE",
    "Distance",
    "bernstein",
    "binomial_tail",
    "chi_distance",
    "chi_square",
    "correlated",
    "deviation",
    "dispersed",
    "quantile",
    "shifted",
    "total_variation",
    "two_samples",
]

NEVER = 1e-12
"""Probability below which a deviation is no chance: checks run with fixed seeds, some hundreds for each process."""
ONCE = 1e-7
"""Probability below which a deviation is no chance, where a process has a few tests, or tests of few draws."""
_COUNT = 20.0
"""Least expected count of a cell."""


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Return the probability that chance alone gives a larger chi-square statistic.

    Args:
        counts: Observed counts, float64 [...], of any shape; those of extrapolated frequencies can be negative.
        expected: Expected counts, of the same shape. Cells expected less than 20 times are taken together, those
            expected never must stay empty.

    Returns:
        The upper tail of the chi-square distribution; 0 if a cell of expectation 0 was seen.
    """
    counts, expected = counts.reshape(-1).double(), expected.reshape(-1).double()
    if bool((counts[expected <= 1e-12] > 0).any()) or not bool((counts + expected).isfinite().all()):
        return 0.0
    counts, expected = _lumped(counts, expected)
    rare, tails = expected < _COUNT / 2, list[float]()
    if bool((seen := rare & (counts > 0)).any()):  # the upper tails of Poisson counts
        tails.append(float(rare.sum() * torch.special.gammainc(counts[seen], expected[seen]).min()))
    counts, expected = counts[~rare], expected[~rare]
    if len(counts) > 1:
        tails.append(_tail(float(((counts - expected).square() / expected).sum()), len(counts) - 1))
    return least(max(1, len(tails)) * least(*tails))


def _tail(statistic: float, freedom: int) -> float:
    """Return the probability that a chi-square variable exceeds ``statistic``."""
    half, value = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half, value))


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


def deviation(counts: Tensor, expected: Tensor) -> float:
    """Return how improbable observed counts are, in standard deviations of a normal variable, by chi-square.

    Args:
        counts: Observed counts, float64 [s], as for :func:`chi_square`.
        expected: Expected counts, float64 [s].

    Returns:
        Standard deviations, negative for counts that fit better than most; infinity if a count is positive that must
        be 0.
    """
    return _deviations(chi_square(counts, expected))


def _deviations(chance: float) -> float:
    """Return the number that a standard normal variable exceeds with a given probability; at least -6."""
    return max(-6.0, -float(torch.special.ndtri(torch.tensor(least(chance), dtype=torch.float64))))


def two_samples(a: Tensor, b: Tensor) -> float:
    """Return how improbable it is that two samples have one distribution, in standard deviations, by chi-square.

    Args:
        a: Counts of the first sample, float64 [s].
        b: Counts of the second sample, float64 [s].
    """
    both = (a + b).double()
    cells = [_lumped(x.double(), both) for x in (a, b)]
    used = cells[0][1] >= _COUNT / 2
    a, b = (x[used] for x, _ in cells)
    if len(a) < 2:
        return 0.0
    up, down = (b.sum() / a.sum()).sqrt(), (a.sum() / b.sum()).sqrt()
    return _deviations(_tail(float(((up * a - down * b).square() / (a + b)).sum()), len(a) - 1))


class Distance(NamedTuple):
    """Distance of observed frequencies from a distribution.

    Attributes:
        value: Chi-distance: the square root of the sum over states of (found - law)^2 / law, where rare states are
            counted together; infinite if a state of probability 0 was drawn.
        limit: What chance exceeds once in 10^7 tests; 0 if the distance is infinite.
        cells: Number of states and groups of states that were compared.
    """

    value: float
    limit: float
    cells: int


def chi_distance(found: Tensor, law: Tensor, *, rows: float) -> Distance:
    """Return the chi-distance between observed and expected frequencies of states, with its limit under chance.

    Args:
        found: Observed frequencies of the states, or an estimate of them, float64 [s].
        law: Expected frequencies, float64 [s].
        rows: Number of independent draws from which ``found`` was computed. For an estimate with another variance, the
            number of draws whose frequencies would have that variance.
    """
    if bool((found[law <= 0] > 0).any()):
        return Distance(math.inf, 0.0, len(law))
    counts, expected = _lumped(found.double() * rows, law.double() * rows)
    real = expected >= _COUNT / 2
    counts, expected = counts[real], expected[real]
    distance = float(((counts - expected).square() / expected).sum() / rows)
    return Distance(math.sqrt(distance), math.sqrt(quantile(max(1, len(counts) - 1)) / rows), len(counts))


def quantile(freedom: float) -> float:
    """Return the chi-square value that chance exceeds once in 10^7 tests, by Wilson and Hilferty's approximation.

    Args:
        freedom: Number of degrees of freedom.
    """
    third = 2 / (9 * freedom)
    return freedom * (1 - third + 5.2 * math.sqrt(third)) ** 3


def bernstein(total: Tensor, variance: Tensor, largest: Tensor) -> Tensor:
    """Return the deviation of sums, in standard deviations that rare large terms widen (Bernstein's inequality).

    Args:
        total: Sums of independent terms of mean 0, of any shape.
        variance: Their variances, of the same shape.
        largest: Largest size of a term of each, of the same shape.
    """
    size = total.abs()
    return size / (variance + largest * size / 3).clamp(min=1e-12).sqrt()


def total_variation(draws: Tensor, law: Tensor) -> float:
    """Return the total variation distance: half the l1 distance between the frequencies of draws and a distribution.

    Args:
        draws: State index of each of r draws, int64 [r]. Indices from s on count as draws but are in none of the s
            states.
        law: Probabilities of the states, float64 [s].
    """
    found = torch.bincount(draws, minlength=len(law))[: len(law)].double() / len(draws)
    return float((found - law).abs().sum() / 2)


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
