"""Masking kernels whose rate depends on the token, such as a kernel that masks rare tokens first.

They are the state-dependent absorbing processes of MD4 (arXiv 2406.04329, section 4): at total noise sigma, token v is
unmasked with probability alpha_v(sigma) and masked with probability hit_v(sigma) = 1 - alpha_v(sigma). Under such a
kernel, cross-entropy weighted by the clean token's rate is not a bound on -log p: its minimum is not at the true
posterior. Axes: b batch, l length, n states (the last is the mask), m = n - 1 data tokens.
"""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.numerics import FLOOR, log1mexp, take, tiny
from sedd_graph.diffusion.tokens.kernel import Kernel, Replacement

from ._frequencies import FrequencyConfig, thinned, token_frequencies

__all__ = ["LearnedPower", "Power", "Spindle", "TokenMasking"]


class TokenMasking(Kernel):
    """Base class of kernels that mask token v at rate -(d alpha_v / d sigma) / alpha_v and never change a mask.

    alpha_v(sigma) is the probability that token v is still unmasked at total noise sigma. Subclasses define
    :meth:`trait_of`, which computes one parameter of the masking rate per token, once at construction, and
    :meth:`token_schedules`, which computes alpha_v from this parameter (:attr:`trait`) and sigma.
    """

    abstract: ClassVar[bool] = True
    clamp_safe = True
    config: FrequencyConfig
    fixed_trait: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        frequencies = token_frequencies(self.config, self.data_tokens)
        self._store(self.trait_of(-frequencies.log(), frequencies))

    def _store(self, trait: Tensor) -> None:
        self.register_buffer("fixed_trait", trait, persistent=False)

    @property
    def trait(self) -> Tensor:
        """Parameter of the masking rate of each data token, [m], such as the exponents w_v of the kernel ``power``."""
        return self.fixed_trait

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        return thinned(config, states - 1)

    @abstractmethod
    def trait_of(self, surprisal: Tensor, frequencies: Tensor) -> Tensor:
        """Return the parameter of the masking rate of each of the m data tokens.

        Args:
            surprisal: Surprisal -log(frequency) of each token, nats, float64 [m].
            frequencies: Frequencies of the tokens, float64 [m], of sum 1.

        Returns:
            The initial value of :attr:`trait`, float64 [m].
        """

    @abstractmethod
    def token_schedules(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log-probabilities that each data token is unmasked, and that it is masked, at total noise sigma.

        Args:
            sigma: Total noise, [b].

        Returns:
            Three tensors [b, m], with one column for each of the m data tokens v: log alpha_v, the log-probability
            that v is unmasked; log hit_v, the log-probability that v is masked, where hit_v = 1 - alpha_v; and the
            derivative of log hit_v in sigma.
        """

    @property
    def mask(self) -> int:
        return self.states - 1

    def _mask_rates(self, sigma: Tensor) -> Tensor:
        """Return the rate from each data token to the mask per unit of ``sigma`` [b], [b, m]."""
        log_keep, log_hit, growth = self.token_schedules(sigma)
        return growth * torch.exp(log_hit - log_keep)

    def _step(self, data: Tensor, x: Tensor, *, stay: Tensor) -> Tensor:
        """Return a step's probabilities [b, l, n]: ``data`` [b, l, m] and ``stay`` [b, l] at masks; unmasked tokens stay."""
        masked = (x == self.mask)[..., None]
        moved = torch.cat([data, stay[..., None]], -1)
        still = torch.zeros_like(moved).scatter(-1, x[..., None], 1.0)
        return torch.where(masked, moved, still)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < self.token_schedules(sigma)[1].exp().gather(1, x0.clamp(max=self.mask - 1))
        return torch.where(hit & corrupt, self.mask, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        return torch.full((rows, length), self.mask, dtype=torch.int64, device=generator.device)

    def rate_matrix(self, sigma: float) -> Tensor:
        rates = self._mask_rates(torch.tensor([sigma], dtype=torch.float64))[0]
        out = -torch.diag(torch.cat([rates, rates.new_zeros(1)]))
        out[self.mask, :-1] = rates
        return out

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        flat = level.reshape(-1)
        keep = torch.exp(self._log_kept(flat) - self._log_kept(torch.full_like(flat, start)))
        out = torch.diag_embed(torch.nn.functional.pad(keep, (0, 1), value=1.0))
        out[:, self.mask, :-1] = 1 - keep
        return out.reshape(*level.shape, self.states, self.states)

    def replacement(self, sigma: float, start: float = 0.0) -> Replacement:
        now, before = (self._log_kept(torch.tensor([x], dtype=torch.float64))[0] for x in (sigma, start))
        keep = torch.nn.functional.pad(torch.exp(now - before), (0, 1), value=1.0)
        return Replacement(keep, torch.nn.functional.one_hot(torch.tensor(self.mask), self.states).double())

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        log_keep, log_hit, growth = self.token_schedules(sigma)
        rates = growth * torch.exp(log_hit - log_keep)
        masked = xt == self.mask
        scores = log_score[..., : self.mask].masked_fill(~masked[..., None], 0.0)
        log_k = (log_keep - log_hit).gather(1, x0)
        positive = (scores.exp() @ rates[..., None])[..., 0]
        # the rate times alpha_v / hit_v is the derivative of log hit_v
        entropy = positive - growth.gather(1, x0) * (take(scores, x0) - log_k + 1)
        return torch.where(masked, entropy, 0.0)

    def _masked_posterior(self, log_x0: Tensor, log_hit: Tensor) -> Tensor:
        """Return the log-posterior of the clean token given that its position is masked, [b, l, m]: ``log_x0`` times hit_v."""
        return (log_x0[..., : self.mask] + log_hit[:, None]).log_softmax(-1)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        _, log_hit, growth = self.token_schedules(sigma)
        masked = xt == self.mask
        belief = self._masked_posterior(log_x0.masked_fill(~masked[..., None], 0.0), log_hit)
        # sum_v growth_v mu_v - growth_x0 (1 + log mu_x0), mu the posterior; 1 - mu_x0 is a sum, since the difference would cancel
        others = belief.exp().scatter(-1, x0[..., None], 0.0)
        doubt, sure = others.sum(-1), take(belief, x0)
        near = doubt < 0.5
        surprise = torch.where(near, -torch.log1p(-torch.where(near, doubt, 0.0)), -sure) - doubt
        loss = growth.gather(1, x0) * surprise + (others @ growth[..., None])[..., 0]
        return torch.where(masked, loss, 0.0)

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        log_keep, log_hit, _ = self.token_schedules(sigma)
        score = self._masked_posterior(log_x0, log_hit) + (log_keep - log_hit)[:, None]
        score = torch.cat([score, torch.full_like(score[..., :1], FLOOR)], -1)
        return score.scatter(-1, xt[..., None], 0.0)

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        moved = self._mask_rates(sigma)[:, None] * score[..., : self.mask]
        return self._step(moved, x, stay=torch.zeros_like(moved[..., 0])).scatter(-1, x[..., None], 0.0)

    def _log_kept(self, sigma: Tensor) -> Tensor:
        """Return log alpha_v [b, m], 0 where ``sigma`` is 0."""
        return torch.where(sigma[:, None] > 0, self.token_schedules(sigma.clamp(min=1e-30))[0], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        step = self._log_kept(sigma_next) - self._log_kept(sigma)
        moved = torch.expm1(step)[:, None] * score[..., : self.mask]
        return self._step(moved, x, stay=1 - moved.sum(-1))

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        log_hit = self.token_schedules(sigma)[1]
        before = self.token_schedules(sigma_next.clamp(min=1e-30))[1].masked_fill(sigma_next[:, None] <= 0, FLOOR)
        belief = x0_probs[..., : self.mask] * log_hit.exp()[:, None]
        belief = belief / belief.sum(-1, keepdim=True).clamp(min=tiny(belief))
        moved = belief * -torch.expm1(before - log_hit)[:, None]
        return self._step(moved, x, stay=1 - moved.sum(-1))


class Power(TokenMasking, kind="kernel"):
    """Masking kernel whose rate depends on token surprisal: token v is masked with probability (1 - exp(-sigma))^w_v.

    The exponents are w_v = exp(-gamma z_v). Here z_v is the surprisal -log(frequency of v), shifted and scaled to mean
    0 and standard deviation 1 under the token frequencies, then clamped to [-2, 2]. The masking probability has the
    form of MD4 (arXiv 2406.04329, section 4).
    """

    class Config(FrequencyConfig):
        gamma: Annotated[float, pydantic.Field(ge=-1, le=1)] = 0.5
        """Strength of the dependence on surprisal, in [-1, 1]. Above 0: rare tokens are masked first and generated
        last; below 0: frequent tokens are masked first; 0: all tokens have one rate, as under ``absorb``."""

    config: Config

    @property
    def rate_bound(self) -> float:
        # the growth of log hit_v on the clock log(exp(sigma) - 1) is w (1 - exp(-sigma)) / (exp(sigma) - 1) = w exp(-sigma) <= w
        return float(self.trait.detach().max())

    def trait_of(self, surprisal: Tensor, frequencies: Tensor) -> Tensor:
        mean = (frequencies * surprisal).sum()
        spread = (frequencies * (surprisal - mean).square()).sum().sqrt().clamp(min=1e-12)
        return torch.exp(-self.config.gamma * ((surprisal - mean) / spread).clamp(-2, 2))

    def token_schedules(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, sigma = self.trait.to(sigma), sigma[:, None]
        # in logarithms, so that neither hit_v nor 1 - hit_v cancels
        log_hit = w * log1mexp(sigma)
        log_keep = log1mexp((-log_hit).clamp(min=tiny(sigma)))
        return log_keep, log_hit, w / torch.expm1(sigma)


class LearnedPower(Power, kind="kernel"):
    """Masking kernel ``power`` whose exponents w_v are trained with the network (GenMD4, arXiv 2406.04329, section 4).

    The exponents are initialised as in ``power``. They affect the loss in two ways: the bound depends on them, and so
    does the distribution of the noisy rows. The objective ``genmd4`` estimates the gradient through both; other
    objectives reject this kernel with an error.
    """

    learned = True

    class Config(Power.Config):
        pass

    config: Config

    def _store(self, trait: Tensor) -> None:
        # softplus(raw) = w
        self.raw = torch.nn.Parameter(torch.log(torch.expm1(trait)).float())

    @property
    def trait(self) -> Tensor:
        return torch.nn.functional.softplus(self.raw)


class Spindle(TokenMasking, kind="kernel"):
    """Masking kernel with DiffusionBERT's spindle schedule, which masks rare tokens first (arXiv 2211.15029).

    Token v is masked with probability u + strength sin(pi u) H_v, where u = 1 - exp(-sigma) and H_v = 1 - (mean
    surprisal) / (surprisal of v), clamped so that the probability increases in sigma. The mean surprisal is over the
    token frequencies. Apart from the clamp, the expected surprisal of the unmasked tokens falls linearly in u.
    DiffusionBERT takes the mean over the sentence instead, so that a token's rate depends on the other tokens; its
    process is not a Markov process of each token alone, and its reverse rates are not known.
    """

    class Config(FrequencyConfig):
        strength: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.3
        """Strength of the dependence of the masking rate on token frequency, in (0, 1]: the amplitude of the sine in
        the schedule (DiffusionBERT's lambda). In the limit 0 all tokens have one rate, as under ``absorb``."""

    config: Config

    @property
    def rate_bound(self) -> float:
        # the growth of log hit_v on the clock log(exp(sigma) - 1) is left (1 + a cos x) / (1 + a sin(x) / x) with x = pi u and
        # a = pi lean > -1. As cos x <= sin(x) / x it is below 1 for a > 0, and for a < 0 below (1 - cos x) / (1 - sin(x) / x),
        # which falls from 3 to 2
        return 3.0

    def trait_of(self, surprisal: Tensor, frequencies: Tensor) -> Tensor:
        limit = 0.9 / (math.pi * self.config.strength)
        return (1 - (frequencies * surprisal).sum() / surprisal).clamp(-limit, limit)

    def token_schedules(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lean, sigma = self.config.strength * self.trait.to(sigma), sigma[:, None]
        u, left = -torch.expm1(-sigma), torch.exp(-sigma)
        wave = torch.sin(math.pi * torch.where(u < 0.5, u, left))  # sin(pi u) = sin(pi (1 - u)), exact at both ends
        hit, keep = u + lean * wave, left - lean * wave
        growth = left * (1 + lean * math.pi * torch.cos(math.pi * u)) / hit
        return torch.where(hit < 0.5, torch.log1p(-hit), torch.log(keep)), torch.log(hit), growth
