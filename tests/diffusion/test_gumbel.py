"""Noise behind draws that are given: it makes them again, and is what noise is."""

import math

import pytest
import torch
from scipy import stats

from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.gumbel import gumbel, posterior_gumbel, replay

DRAWS, LAW = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64)
GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _seed() -> None:
    GENERATOR.manual_seed(0)


def test_a_trajectory_is_replayed() -> None:
    """math: 7.4, 4,000 of 4,000: whatever was chosen, likely or not, in float32 logits with masks at -1e4."""
    logits = torch.randn(4000, 50, generator=GENERATOR) * 6
    logits[:, -1] = -1e4
    chosen = torch.randint(0, 50, (4000,), generator=GENERATOR)
    noise = posterior_gumbel(logits, chosen, generator=GENERATOR)
    assert torch.equal(replay(logits, noise), chosen)
    trajectory = chosen.reshape(8, 20, 25)  # any leading axes
    again = posterior_gumbel(logits.reshape(8, 20, 25, 50), trajectory, generator=GENERATOR)
    assert torch.equal(replay(logits.reshape(8, 20, 25, 50), again), trajectory)


def test_over_draws_it_is_standard_and_independent() -> None:
    log_weights = LAW.log().expand(DRAWS, -1) + 3.0  # not normalised
    noise = posterior_gumbel(log_weights, categorical(LAW.expand(DRAWS, -1), generator=GENERATOR), generator=GENERATOR)
    for state in range(5):
        assert stats.kstest(noise[:, state].numpy(), "gumbel_r").pvalue > 1e-3
    ranks = torch.exp(-torch.exp(-noise))  # even on (0, 1)
    off = torch.corrcoef(ranks.T) - torch.eye(5)
    assert float(off.abs().max()) < 5 / math.sqrt(DRAWS)
    # given one choice it is neither
    fixed = posterior_gumbel(log_weights, torch.full((DRAWS,), 3), generator=GENERATOR)
    assert stats.kstest(fixed[:, 3].numpy(), "gumbel_r").pvalue < 1e-9
    assert stats.kstest(gumbel(DRAWS, generator=GENERATOR).numpy(), "gumbel_r").pvalue > 1e-3


def test_given_a_choice_it_is_noise_that_made_it() -> None:
    """Beside rejection: noise is drawn until it makes the choice."""
    noise = gumbel(20 * DRAWS, 5, generator=GENERATOR)
    kept = noise[replay(LAW.log().expand_as(noise), noise) == 3]
    found = posterior_gumbel(LAW.log().expand(len(kept), -1), torch.full((len(kept),), 3), generator=GENERATOR)
    for state in range(5):
        assert stats.ks_2samp(found[:, state].numpy(), kept[:, state].numpy()).pvalue > 1e-3


def test_with_other_weights_it_makes_draws_of_theirs() -> None:
    chosen = categorical(LAW.expand(DRAWS, -1), generator=GENERATOR)
    noise = posterior_gumbel(LAW.log().expand(DRAWS, -1), chosen, generator=GENERATOR)
    other = torch.tensor([0.1, 0.3, 0.15, 0.05, 0.4], dtype=torch.float64)
    again = replay(other.log().expand(DRAWS, -1), noise)
    counts = torch.bincount(again, minlength=5).double()
    assert stats.chisquare(counts.numpy(), (other * DRAWS).numpy()).pvalue > 1e-3
    # and what has not become less likely beside the rest stays
    stays = chosen[again != chosen]
    assert set(stays.tolist()) == {0, 1, 2, 3}
    assert set(again[again != chosen].tolist()) == {1, 2, 3, 4}


def test_what_could_not_have_been_drawn_is_refused() -> None:
    for row, chosen in (([0.0, -math.inf], 1), ([0.0, math.nan], 0), ([math.inf, 0.0], 1)):
        with pytest.raises(ValueError, match="a chosen state has no weight, or a weight is not finite"):
            posterior_gumbel(torch.tensor([row]), torch.tensor([chosen]), generator=GENERATOR)
