"""Tweedie steps at high noise: exact, or refused; rows never stay noise because probabilities sum to nothing."""

from typing import Any

import pytest
import torch
from sedd_graph_registry.noise.interpolating import Absorb, Mixture, Uniform, Unigram
from sedd_graph_registry.noise.rate_matrix import Ordinal, Rates
from sedd_graph_registry.noise.schedules import Geometric
from sedd_graph_registry.sampling.steps import Analytic
from torch import Tensor

from sedd_graph.component.base import Context
from sedd_graph.diffusion.tokens.tweedie import LOSS, needs_float64, tweedie
from sedd_graph.diffusion.tokens.walk import WalkSettings
from sedd_graph.errors import UserError

N = 28


def kernel_of(cls: Any, **config: Any) -> Any:
    return cls(cls.Config(**config), Context({"n": N}))


def law(kernel: Any) -> Tensor:
    """A distribution of the clean token, float64 [n], 0 at the mask."""
    found = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found[kernel.data_tokens :] = 0
    return found / found.sum()


def certain_score(kernel: Any, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-scores of one token with a known distribution, float32 [1, n, n], every state z, and the level."""
    z, level = torch.arange(N)[None], torch.tensor([sigma])
    log_x0 = law(kernel).log().clamp(min=-1e6).expand(1, N, N)
    return kernel.log_score(log_x0, z, level.double()).float(), z, level


@pytest.mark.parametrize("sigma", [5.0, 10.0, 15.0, 20.0])
@pytest.mark.parametrize("cls", [Uniform, Mixture])
def test_a_step_from_any_noise_is_bayes_rule(cls: Any, sigma: float) -> None:
    kernel = kernel_of(cls)
    log_score, z, level = certain_score(kernel, sigma)
    found = tweedie(kernel, log_score.double().exp(), z, level, 0 * level)
    joint = kernel.transition_matrix(sigma) * law(kernel)
    assert torch.allclose(found[0], joint / joint.sum(1, keepdim=True), atol=1e-5)
    lossy = kernel.analytic(log_score.exp(), z, level, 0 * level).clamp(min=0)
    if cls is Uniform and sigma == 20:  # what a float32 score gives
        assert float(lossy.sum(-1).min()) == 0


@pytest.mark.parametrize("cls", [Uniform, Unigram, Mixture])
@pytest.mark.parametrize("step", [0.01, 1.0, 6.5])
def test_float32_is_accurate_enough_in_short_steps(cls: Any, step: float) -> None:
    kernel = kernel_of(cls)
    log_score, z, level = certain_score(kernel, step + 0.5)
    below = level - step
    assert not needs_float64(kernel, level, below)
    found = tweedie(kernel, log_score.exp(), z, level, below)
    exact = tweedie(kernel, log_score.double().exp(), z, level.double(), below.double())
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < LOSS


def test_long_steps_and_unknown_rates_take_float64() -> None:
    level = torch.tensor([1.0, 8.0])
    assert needs_float64(kernel_of(Uniform), level, 0 * level)
    assert not needs_float64(kernel_of(Uniform), level, level - 0.1)
    assert needs_float64(kernel_of(Ordinal), level, level - 0.1)
    assert not needs_float64(kernel_of(Absorb), level, 0 * level)


@pytest.mark.parametrize(("cls", "sigma"), [(Ordinal, 4.0), (Ordinal, 20.0)])
def test_a_step_too_long_for_its_kernel_is_refused(cls: Any, sigma: float) -> None:
    kernel = kernel_of(cls)
    log_score, z, level = certain_score(kernel, sigma)
    with pytest.raises(UserError, match=r"too long for Ordinal.*more steps"):
        tweedie(kernel, log_score.double().exp(), z, level, 0 * level)


def test_rates_without_balance_are_refused_beyond_rounding() -> None:
    table = ((0, 1, 0, 0), (0, 0, 2, 0), (0, 0, 0, 1), (3, 0, 0.1, 0))
    kernel = Rates(Rates.Config(table=table), Context({"n": 4}))
    z, level = torch.arange(4)[None], torch.tensor([25.0])
    score = kernel.log_score(torch.full((1, 4, 4), 0.25).double().log(), z, level.double()).float().double().exp()
    with pytest.raises(UserError, match="off by"):
        tweedie(kernel, score, z, level, 0 * level)


def test_log_scores_whose_rounding_hides_the_clean_token_are_refused() -> None:
    """Frequencies make the log-scores of ``unigram`` far from 0, where float32 has no room for exp(-20)."""
    kernel = kernel_of(Unigram)
    unit = torch.finfo(torch.float32).eps
    log_score, z, level = certain_score(kernel, 20.0)
    tweedie(kernel, log_score.double().exp(), z, level, 0.9 * level, unit=unit)  # a short step amplifies little
    with pytest.raises(UserError, match=r"too long for Unigram.*more steps"):
        tweedie(kernel, log_score.double().exp(), z, level, 0 * level, unit=unit)
    log_score, z, level = certain_score(kernel_of(Uniform), 20.0)
    tweedie(kernel_of(Uniform), log_score.double().exp(), z, level, 0 * level, unit=unit)


@pytest.mark.parametrize("cls", [Uniform, Unigram])
def test_one_step_of_the_sampler_draws_the_distribution(cls: Any) -> None:
    """From total noise 20 in a single step: all rows had stayed noise."""
    kernel = kernel_of(cls)
    exact = law(kernel)
    schedule = Geometric(Geometric.Config(), Context({"n": N}))
    generator = torch.Generator().manual_seed(1)
    x = torch.full((20_000, 1), 3)

    def denoise(x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None) -> dict[str, Tensor]:
        return {"log_x0": exact.log().float().expand(len(x), x.shape[1], N)}

    sampler = Analytic(Analytic.Config(steps=1), Context({"n": N}))
    settings = WalkSettings(
        free=torch.ones_like(x, dtype=torch.bool), kernel=kernel, schedule=schedule, generator=generator
    )
    out = sampler.run(denoise, x, settings)
    found = torch.bincount(out[:, 0], minlength=N).double() / len(out)
    assert float((found - exact).abs().sum() / 2) < 0.02
    assert sampler.clamped == 0
