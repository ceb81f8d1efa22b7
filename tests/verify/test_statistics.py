"""Statistics of the proofs: their level under chance and their power, by repeated draws and by closed forms."""

import math

import pytest
import torch
from torch import Tensor

from sedd_graph.verify.statistics import (
    NEVER,
    bernstein,
    binomial_tail,
    chi_distance,
    chi_square,
    correlated,
    deviation,
    dispersed,
    quantile,
    shifted,
    total_variation,
    two_samples,
)

LAW = torch.softmax(1.5 * torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0)
"""A distribution of 60 states, some of them rare."""
TRIALS = 120


def counts(law: Tensor, draws: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.bincount(torch.multinomial(law, draws, replacement=True, generator=generator), minlength=60).double()


@pytest.mark.parametrize("draws", [200, 2_000, 50_000])
def test_chi_square_is_even_under_chance(draws: int) -> None:
    chances = torch.tensor([chi_square(counts(LAW, draws, s), draws * LAW) for s in range(TRIALS)])
    for share in (0.05, 0.3, 0.7):  # rare cells make it conservative for few draws
        assert float((chances < share).double().mean()) < share + 5 * math.sqrt(share * (1 - share) / TRIALS)
    assert float((chances < 0.5).double().mean()) > 0.35
    assert chances.min() > 1e-5


def test_chi_square_finds_a_temperature_of_97_percent_in_its_noncentral_law() -> None:
    other = LAW ** (1 / 0.97) / (LAW ** (1 / 0.97)).sum()
    draws = 200_000
    excess, freedom = draws * float(((other - LAW).square() / LAW).sum()), 59
    found = [deviation(counts(other, draws, s), draws * LAW) for s in range(8)]
    spread = 2 / (9 * freedom)  # by the cube root of Wilson and Hilferty
    expected = (math.cbrt(1 + excess / freedom) - 1 + spread) / math.sqrt(spread)
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.1)
    assert min(found) > 12


@pytest.mark.parametrize("value", [-2.0, 0.0, 1.0, 4.0, 9.0])
def test_deviations_are_those_of_a_normal_variable(value: float) -> None:
    """Of one degree of freedom: the probability that chi-square exceeds x^2 is that of both tails beyond x."""
    n = 1e6
    gap = abs(value) * math.sqrt(n) / 2
    found = deviation(torch.tensor([n / 2 + gap, n / 2 - gap]), torch.tensor([n / 2, n / 2]))
    tail = math.erfc(abs(value) / math.sqrt(2))
    assert (found == -6 and value == 0) or math.erfc(found / math.sqrt(2)) / 2 == pytest.approx(tail, rel=1e-6)


def test_states_of_probability_0_must_not_be_drawn() -> None:
    law, seen = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([500.0, 499.0, 1.0]).double()
    assert chi_square(seen, 1000 * law) == 0.0
    assert deviation(seen, 1000 * law) == math.inf
    assert chi_distance(seen / 1000, law, rows=1000)[:2] == (math.inf, 0.0)
    assert chi_square(torch.tensor([990.0, 10.0]), torch.tensor([1000.0, 0.1])) < NEVER  # rare, and far too often


def test_a_certain_state_is_no_surprise() -> None:
    seen = torch.tensor([1000.0, 0.0])
    assert (chi_square(seen, seen), deviation(seen, seen)) == (1.0, -6.0)


def test_few_draws_of_a_rare_state_say_nothing() -> None:
    assert chi_square(torch.tensor([999.0, 1.0]), torch.tensor([1000.0, 0.1])) > 0.05


def test_a_chi_distance_is_within_its_limit_under_chance_and_beyond_it_for_a_shift() -> None:
    rows = 20_000
    found = [chi_distance(counts(LAW, rows, s) / rows, LAW, rows=rows) for s in range(TRIALS)]
    assert all(x.value < x.limit for x in found)
    squares = torch.tensor([rows * x.value**2 for x in found], dtype=torch.float64)
    freedom = found[0].cells - 1
    assert float(squares.mean()) == pytest.approx(freedom, abs=6 * math.sqrt(2 * freedom / TRIALS))
    other = LAW ** (1 / 0.9) / (LAW ** (1 / 0.9)).sum()
    shift = math.sqrt(float(((other - LAW).square() / LAW).sum()))
    seen = chi_distance(counts(other, rows, 1) / rows, LAW, rows=rows)
    assert seen.value > seen.limit
    assert seen.value == pytest.approx(shift, rel=0.2)


@pytest.mark.parametrize("freedom", [1, 3, 30, 400])
def test_the_limit_is_exceeded_at_most_once_in_ten_million_tests(freedom: int) -> None:
    half, value = torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(quantile(freedom) / 2).double()
    assert 0.5e-8 < float(torch.special.gammaincc(half, value)) < 1e-7


def test_two_samples_of_one_distribution_and_of_two() -> None:
    found = torch.tensor([two_samples(counts(LAW, 5_000, s), counts(LAW, 20_000, s + 999)) for s in range(TRIALS)])
    assert abs(float(found.mean())) < 0.3
    assert 0.8 < float(found.std()) < 1.2
    assert found.max() < 4.5
    other = LAW ** (1 / 0.8) / (LAW ** (1 / 0.8)).sum()
    assert two_samples(counts(other, 5_000, 1), counts(LAW, 20_000, 2)) > 6


def test_binomial_counts() -> None:
    chance, trials = torch.linspace(0.05, 0.95, 20, dtype=torch.float64), torch.full((20,), 2_000.0)
    draws = [torch.binomial(trials.double(), chance, generator=torch.Generator().manual_seed(s)) for s in range(TRIALS)]
    chances = torch.tensor([binomial_tail(x, trials, chance) for x in draws])
    assert float((chances < 0.05).double().mean()) < 0.11
    assert chances.min() > 1e-4
    far = draws[0].clone()
    far[7] += 9 * math.sqrt(2_000 * float(chance[7] * (1 - chance[7])))
    assert binomial_tail(far, trials, chance) < NEVER


def test_a_common_shift_is_seen_where_no_single_count_shows_it() -> None:
    chance, trials = torch.full((400,), 0.3, dtype=torch.float64), torch.full((400,), 500.0, dtype=torch.float64)
    slope, generator = torch.ones(400), torch.Generator().manual_seed(3)
    moved = torch.binomial(trials, 1.03 * chance, generator=generator)
    assert binomial_tail(moved, trials, chance) > 1e-4
    assert shifted(moved, trials, chance, slope) < NEVER
    still = torch.tensor(
        [shifted(torch.binomial(trials, chance, generator=generator), trials, chance, slope) for _ in range(TRIALS)]
    )
    assert float((still < 0.1).double().mean()) == pytest.approx(0.1, abs=0.06)
    assert shifted(moved, trials, chance, 0 * slope) == 1.0


@pytest.mark.parametrize("axis", [0, 1])
def test_draws_that_depend_on_each_other(axis: int) -> None:
    generator = torch.Generator().manual_seed(4)
    u = torch.rand(256, 256, generator=generator)
    free = (u < 0.4).double()
    assert dispersed(free, 0.4) > 1e-3
    assert correlated(free, 0.4) > 1e-3
    common = torch.rand(*((1, 256) if axis == 0 else (256, 1)), generator=generator).expand(256, 256)
    mixed = (torch.where(torch.rand(256, 256, generator=generator) < 0.5, common, u) < 0.4).double()
    assert dispersed(mixed, 0.4) < NEVER
    twice = free.clone()
    if axis == 0:
        twice[5] = twice[77]
    else:
        twice[:, 5] = twice[:, 77]
    assert correlated(twice, 0.4) < NEVER


def test_sums_with_rare_large_terms() -> None:
    """A normal sum is counted in standard deviations, one rare term of ten standard deviations as less."""
    total, variance = torch.tensor([6.0, 10.0]), torch.tensor([1.0, 1.0])
    found = bernstein(total, variance, torch.tensor([0.0, 10.0]))
    assert found.tolist() == pytest.approx([6.0, 10 / math.sqrt(1 + 100 / 3)])


def test_total_variation_is_half_the_sum_of_differences_of_frequencies() -> None:
    law = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert total_variation(torch.tensor([0, 0, 1, 2]), law) == 0
    assert total_variation(torch.tensor([0, 0, 0, 0]), law) == pytest.approx(0.5)
    # a state outside the distribution adds nothing, but the others are less frequent
    assert total_variation(torch.tensor([0, 0, 1, 3]), law) == pytest.approx(0.125)
