"""Masking whose pace depends on the token: the more a token says, the sooner (or later) it is masked.

The sound general form is the state-dependent absorbing kernel (MD4, arXiv 2406.04329, section 4): a token v is still seen
with chance alpha_v, and hit_v = 1 - alpha_v. Plain cross-entropy weighted by the clean token's rate is *not* a bound
here; its optimum is another law. Axes: b batch, l length, n states (the last is the mask), m = n - 1 data tokens.
"""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.numerics import FLOOR, log1mexp
from sedd_graph.diffusion.tokens.process import Kernel

from ._frequencies import FrequencyConfig, thinned, token_law

__all__ = ["LearnedPower", "Power", "Spindle", "TokenMasking"]


def _at(values: Tensor, index: Tensor) -> Tensor:
    """``values`` [b, l, m] at ``index`` [b, l]."""
    return values.gather(-1, index[..., None])[..., 0]


class TokenMasking(Kernel):
    """Token v falls to the mask at rate -alpha_v' / alpha_v and stays there."""

    abstract: ClassVar[bool] = True
    clamp_safe = True
    trait: Tensor

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        law = token_law(self.config, self.data_tokens)
        self._hold(self.trait_of(-law.log(), law))

    def _hold(self, trait: Tensor) -> None:
        self.register_buffer("trait", trait, persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        return thinned(config, states - 1)

    @abstractmethod
    def trait_of(self, surprisal: Tensor, law: Tensor) -> Tensor:
        """What sets tokens apart, float64 [m], from their surprisal in nats and their law."""

    @abstractmethod
    def paces(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log alpha_v, log hit_v, and the derivative of log hit_v in sigma, each [b, m]."""

    @property
    def mask(self) -> int:
        return self.states - 1

    @property
    @abstractmethod
    def rate_bound(self) -> float:
        """The greatest growth of log hit_v on the clock log(exp(sigma) - 1), which no mean over tokens exceeds."""

    def _rates(self, sigma: Tensor) -> Tensor:
        """The rate v -> mask, [b, m]."""
        log_keep, log_hit, growth = self.paces(sigma)
        return growth * torch.exp(log_hit - log_keep)

    def _full(self, data: Tensor, x: Tensor, *, stay: Tensor) -> Tensor:
        """[b, l, n] from [b, l, m] at masks, with ``stay`` [b, l] at the mask; everything else stays where it is."""
        masked = (x == self.mask)[..., None]
        moved = torch.cat([data, stay[..., None]], -1)
        still = torch.zeros_like(moved).scatter(-1, x[..., None], 1.0)
        return torch.where(masked, moved, still)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < self.paces(sigma)[1].exp().gather(1, x0.clamp(max=self.mask - 1))
        return torch.where(hit & corrupt, self.mask, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        return torch.full((rows, length), self.mask, dtype=torch.int64, device=generator.device)

    def rate_matrix(self, sigma: float) -> Tensor:
        rates = self._rates(torch.tensor([sigma], dtype=torch.float64))[0]
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

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        log_keep, log_hit, growth = self.paces(sigma)
        rates = growth * torch.exp(log_hit - log_keep)
        masked = xt == self.mask
        scores = log_score[..., : self.mask].masked_fill(~masked[..., None], 0.0)
        log_k = (log_keep - log_hit).gather(1, x0)
        positive = (scores.exp() @ rates[..., None])[..., 0]
        # rate times ratio is the growth of log hit
        entropy = positive - growth.gather(1, x0) * (_at(scores, x0) - log_k + 1)
        return torch.where(masked, entropy, 0.0)

    def _belief(self, log_x0: Tensor, log_hit: Tensor) -> Tensor:
        """log of the posterior that knows this position to be masked, [b, l, m]: the prediction reweighed by hit_v."""
        return (log_x0[..., : self.mask] + log_hit[:, None]).log_softmax(-1)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        _, log_hit, growth = self.paces(sigma)
        masked = xt == self.mask
        belief = self._belief(log_x0.masked_fill(~masked[..., None], 0.0), log_hit)
        # sum_v growth_v mu_v - growth_x0 (1 + log mu_x0), with 1 - mu_x0 summed up where it is a small difference
        others = belief.exp().scatter(-1, x0[..., None], 0.0)
        doubt, sure = others.sum(-1), _at(belief, x0)
        near = doubt < 0.5
        surprise = torch.where(near, -torch.log1p(-torch.where(near, doubt, 0.0)), -sure) - doubt
        loss = growth.gather(1, x0) * surprise + (others @ growth[..., None])[..., 0]
        return torch.where(masked, loss, 0.0)

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        log_keep, log_hit, _ = self.paces(sigma)
        score = self._belief(log_x0, log_hit) + (log_keep - log_hit)[:, None]
        score = torch.cat([score, torch.full_like(score[..., :1], FLOOR)], -1)
        return score.scatter(-1, xt[..., None], 0.0)

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        moved = self._rates(sigma)[:, None] * score[..., : self.mask]
        return self._full(moved, x, stay=torch.zeros_like(moved[..., 0])).scatter(-1, x[..., None], 0.0)

    def _log_kept(self, sigma: Tensor) -> Tensor:
        """log alpha_v, 0 where there is no noise."""
        return torch.where(sigma[:, None] > 0, self.paces(sigma.clamp(min=1e-30))[0], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        step = self._log_kept(sigma_next) - self._log_kept(sigma)
        moved = torch.expm1(step)[:, None] * score[..., : self.mask]
        return self._full(moved, x, stay=1 - moved.sum(-1))

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        log_hit = self.paces(sigma)[1]
        before = self.paces(sigma_next.clamp(min=1e-30))[1].masked_fill(sigma_next[:, None] <= 0, FLOOR)
        belief = x0_probs[..., : self.mask] * log_hit.exp()[:, None]
        belief = belief / belief.sum(-1, keepdim=True).clamp(min=torch.finfo(belief.dtype).tiny)
        moved = belief * -torch.expm1(before - log_hit)[:, None]
        return self._full(moved, x, stay=1 - moved.sum(-1))


class Power(TokenMasking, kind="kernel"):
    """Masks by surprisal: hit_v = (1 - exp(-sigma))^w_v, w_v = exp(-gamma z_v), z_v the token's standardised surprisal (MD4's form).

    gamma > 0 masks what says much early, so that it is written last; 0 is absorb; below 0 it is written first.
    """

    class Config(FrequencyConfig):
        gamma: Annotated[float, pydantic.Field(ge=-1, le=1)] = 0.5

    @property
    def rate_bound(self) -> float:
        return float(self.trait.detach().max())  # w (1 - exp(-sigma)) / (exp(sigma) - 1) = w exp(-sigma)

    def trait_of(self, surprisal: Tensor, law: Tensor) -> Tensor:
        mean = (law * surprisal).sum()
        spread = (law * (surprisal - mean).square()).sum().sqrt().clamp(min=1e-12)
        return torch.exp(-self.config.gamma * ((surprisal - mean) / spread).clamp(-2, 2))

    def paces(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, sigma = self.trait.to(sigma), sigma[:, None]
        # in powers, so that neither hit_v nor 1 - hit_v is ever a small difference
        log_hit = w * log1mexp(sigma)
        log_keep = log1mexp((-log_hit).clamp(min=torch.finfo(sigma.dtype).tiny))
        return log_keep, log_hit, w / torch.expm1(sigma)


class LearnedPower(Power, kind="kernel"):
    """``power`` whose w_v are learned with the network, from those of surprisal on (GenMD4, arXiv 2406.04329, section 4).

    The bound depends on them, and so do the draws that estimate it: only an objective that knows (``genmd4``) takes it.
    """

    learned = True

    class Config(Power.Config):
        pass

    def _hold(self, trait: Tensor) -> None:
        # softplus(raw) = w
        self.raw = torch.nn.Parameter(torch.log(torch.expm1(trait)).float())

    @property
    def trait(self) -> Tensor:  # type: ignore[override]
        return torch.nn.functional.softplus(self.raw)


class Spindle(TokenMasking, kind="kernel"):
    """Masks along a spindle: hit_v = u + strength sin(pi u) H_v, u = 1 - exp(-sigma) (DiffusionBERT, arXiv 2211.15029, by vocabulary).

    H_v = 1 - (mean surprisal) / (surprisal of v), clipped so that hit_v grows: the information that is left falls evenly.
    DiffusionBERT measures surprisal against the sentence, so that a token's rate depends on the others: no Markov process
    of single tokens does that, and its reverse rates are unknown.
    """

    class Config(FrequencyConfig):
        strength: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.3

    @property
    def rate_bound(self) -> float:
        # left (1 + a cos x) / (1 + a sin(x) / x) with x = pi u, a = pi lean > -1. As cos x <= sin(x) / x this is below 1 for
        # a > 0, and for a < 0 below (1 - cos x) / (1 - sin(x) / x), which falls from 3 to 2
        return 3.0

    def trait_of(self, surprisal: Tensor, law: Tensor) -> Tensor:
        limit = 0.9 / (math.pi * self.config.strength)
        return (1 - (law * surprisal).sum() / surprisal).clamp(-limit, limit)

    def paces(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lean, sigma = self.config.strength * self.trait.to(sigma), sigma[:, None]
        gone, left = -torch.expm1(-sigma), torch.exp(-sigma)
        wave = torch.sin(
            math.pi * torch.where(gone < 0.5, gone, left)
        )  # sin(pi u) = sin(pi (1 - u)), exact at both ends
        hit, keep = gone + lean * wave, left - lean * wave
        growth = left * (1 + lean * math.pi * torch.cos(math.pi * gone)) / hit
        return torch.where(hit < 0.5, torch.log1p(-hit), torch.log(keep)), torch.log(hit), growth
