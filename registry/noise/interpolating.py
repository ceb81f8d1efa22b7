"""Interpolating kernels: a token is kept, or replaced by a draw that does not depend on what it was.

All of them are P = alpha I + b 1^T with alpha = exp(-sigma), b = (1 - alpha) pi, and one loss fits them all (GIDD, arXiv
2503.04482). Axes: b batch, l length, n states. The clock is that of SEDD's code: tokens are hit at rate 1 per unit of
sigma, and a draw may hit the token itself. Nothing here holds an n x n table but the two methods for proofs.
"""

from abc import abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.numerics import log_expm1
from sedd_graph.diffusion.tokens.process import Kernel

from ._frequencies import FrequencyConfig, thinned, token_law

__all__ = ["Absorb", "Interpolating", "Mixture", "Uniform", "Unigram"]


def _at(values: Tensor, index: Tensor) -> Tensor:
    """``values`` [b, l, n] at ``index`` [b, l]."""
    return values.gather(-1, index[..., None])[..., 0]


def _of(vector: Tensor, index: Tensor) -> Tensor:
    """``vector`` [b or 1, n] at ``index`` [b, l]."""
    return vector.expand(index.shape[0], -1).gather(1, index)


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Draws from ``weights`` [b or 1, n] by uniform numbers ``u`` float64 [b, l]; a weight of 0 never comes out."""
    cdf = weights.double().cumsum(-1).expand(u.shape[0] if weights.shape[0] > 1 else 1, -1)
    u = u * (1 - 2**-53)
    if len(cdf) == 1:
        return torch.searchsorted(cdf[0], u * cdf[0, -1], right=True)
    return torch.searchsorted(cdf.contiguous(), u * cdf[:, -1:], right=True)


class Interpolating(Kernel):
    """P = alpha I + (1 - alpha) pi 1^T, where ``pi`` may change with noise."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """pi at total noise ``sigma`` [b], [b or 1, n], and its derivative in sigma (or zeros that broadcast to it).

        It is a noise process only if ``rate`` is nowhere negative; the proof of the process looks.
        """

    def rate(self, sigma: Tensor) -> Tensor:
        """The rate into each state per unit of sigma, from any other: db/dsigma + b, [b or 1, n]."""
        pi, slope = self.target(sigma)
        return pi - torch.expm1(-sigma)[:, None] * slope

    def _law(self, x0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha [b, 1], b [b, n], and the chance that x0 is seen as itself [b, l]."""
        alpha = torch.exp(-sigma)[:, None]
        spread = -torch.expm1(-sigma)[:, None] * self.target(sigma)[0]
        return alpha, spread, alpha + _of(spread, x0)

    def _mixed(self, x0_probs: Tensor, sigma: Tensor) -> Tensor:
        """The law of the next observation: alpha xhat + b, [b, l, n], never quite 0."""
        spread = -torch.expm1(-sigma)[:, None] * self.target(sigma)[0]
        mixed = torch.exp(-sigma)[:, None, None] * x0_probs + spread[:, None]
        return mixed.clamp(min=_tiny(mixed))

    def _between(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel from ``sigma_next`` up to ``sigma`` as a I + c 1^T: a [b, 1], c [b or 1, n]."""
        step = (sigma - sigma_next)[:, None]
        now, before = self.target(sigma)[0], self.target(sigma_next)[0]
        keep = torch.exp(-step)
        moved = -keep * torch.expm1(-sigma_next)[:, None] * (now - before)
        return keep, (moved - torch.expm1(-step) * now).clamp(min=0)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
        # 24 bits of one draw would never reach the rarest tokens of a large vocabulary
        u = random.rand(*x0.shape).double() + random.rand(*x0.shape).double() * 2**-24
        return torch.where(hit & corrupt, _inverse_cdf(self.target(sigma)[0], u), x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        u = torch.rand(rows, length, generator=generator, device=generator.device, dtype=torch.float64)
        weights = self.target(torch.full((1,), 1e4, device=generator.device))[0]
        if allowed is not None:
            states = allowed.clone()
            if self.mask is not None:
                states[self.mask] = True
            kept = weights * states
            weights = kept if bool(kept.sum() > 0) else states[None].to(weights.dtype)
        return _inverse_cdf(weights, u)

    def rate_matrix(self, sigma: float) -> Tensor:
        into = self.rate(torch.tensor([sigma], dtype=torch.float64))[0].expand(self.states)
        return into[:, None] - torch.diag(into.sum().expand(self.states))

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        flat = level.reshape(-1)
        keep, into = self._between(flat, torch.full_like(flat, start))
        out = keep[..., None] * torch.eye(self.states, dtype=torch.float64) + into[..., None]
        return out.reshape(*level.shape, self.states, self.states)

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        # sum over y of g_z (s_y - r_y log s_y + K(r_y)), r_y = q_y / q_z, q = alpha e_x0 + b, y = z left out of each sum
        alpha, spread, top = self._law(x0, sigma)
        same = xt == x0
        here = torch.where(same, top, _of(spread, xt)).clamp(min=_tiny(top))
        log_score = log_score.scatter(-1, xt[..., None], 0.0)
        positive = log_score.exp().scatter(-1, xt[..., None], 0.0).sum(-1)
        linear = (log_score @ spread[..., None])[..., 0] + alpha * _at(log_score, x0)
        logs = torch.xlogy(spread, spread)
        others = logs.sum(-1, keepdim=True) - _of(logs, xt)
        others = others + torch.where(same, 0.0, torch.xlogy(top, top) - _of(logs, x0))
        away = spread.sum(-1, keepdim=True) - _of(spread, xt) + torch.where(same, 0.0, alpha)
        constant = others - (torch.log(here) + 1) * away
        return _of(self.rate(sigma), xt) * (positive + (constant - linear) / here)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        # g_z / q_z [KL(q || qhat) + q_z / qhat_z - 1 - log(q_z / qhat_z)]: the score entropy of normalised scores
        _, spread, top = self._law(x0, sigma)
        log_mixed = torch.log(self._mixed(log_x0.exp(), sigma))
        log_spread, at_x0 = torch.log(spread.clamp(min=_tiny(spread))), _at(log_mixed, x0)
        # state by state: at a large vocabulary the sums of either logarithm would all but cancel
        kl = (spread[:, None] * (log_spread[:, None] - log_mixed)).sum(-1)
        kl = kl - _of(spread, x0) * (_of(log_spread, x0) - at_x0) + top * (torch.log(top) - at_x0)
        here = torch.where(xt == x0, top, _of(spread, xt)).clamp(min=_tiny(top))
        gap = torch.log(here) - _at(log_mixed, xt)
        return _of(self.rate(sigma), xt) / here * (kl + torch.expm1(gap) - gap)

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        log_mixed = torch.log(self._mixed(log_x0.exp(), sigma))
        return log_mixed - log_mixed.gather(-1, xt[..., None])

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return (_of(self.rate(sigma), x)[..., None] * score).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (P^-1 s)_y P[z, y], P = a I + c 1^T, P^-1 = (I - c 1^T) / a
        keep, into = self._between(sigma, sigma_next)
        before = (score - into[:, None] * score.sum(-1, keepdim=True)) / keep[..., None]
        spread = _of(into, x)[..., None]
        stay = before.gather(-1, x[..., None]) * (keep[..., None] + spread)
        return (before * spread).scatter(-1, x[..., None], stay)

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # Bayes: P[z, y] q_next(y) / q(z), q the law of one observation under xhat
        keep, into = self._between(sigma, sigma_next)
        before, spread = self._mixed(x0_probs, sigma_next), _of(into, x)[..., None]
        stay = before.gather(-1, x[..., None]) * (keep[..., None] + spread)
        weights = (before * spread).scatter(-1, x[..., None], stay)
        return weights / weights.sum(-1, keepdim=True).clamp(min=_tiny(weights))


class Uniform(Interpolating, kind="kernel"):
    """Every token is replaced at rate 1 by one drawn evenly from all (D3PM uniform; SEDD uniform; UDLM)."""

    class Config(ComponentConfig):
        pass

    @property
    def mask(self) -> None:
        return None

    @property
    def rate_bound(self) -> float:
        return 1.0

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma.new_full((1, self.states), 1 / self.states), sigma.new_zeros(1, 1)


class Unigram(Interpolating, kind="kernel"):
    """Every token is replaced at rate 1 by one drawn by its frequency, so that noise has the words of text (GIDD's prior, of any law)."""

    law: Tensor

    class Config(FrequencyConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("law", token_law(self.config, self.states), persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        return thinned(config, states)

    @property
    def mask(self) -> None:
        return None

    @property
    def rate_bound(self) -> float:
        return 1.0

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self.law.to(sigma)[None], sigma.new_zeros(1, 1)


class Mixture(Interpolating, kind="kernel"):
    """Tokens are masked or replaced evenly; replacing dies out as noise grows (GIDD, arXiv 2503.04482).

    A share ``uniform * exp(-decay * sigma)`` of what has been hit stands as an even draw from the data tokens, the rest as
    the mask (the last state). The rate of replacing is that share times 1 - decay (1 - exp(-sigma)): a decay above 1 would
    make it negative at large noise, and there is no such process.
    """

    class Config(ComponentConfig):
        uniform: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.2
        decay: Annotated[float, pydantic.Field(ge=0, le=1)] = 1.0
        """0: the share stays (and the prior is mixed); 1: the prior is masks alone."""

    @property
    def mask(self) -> int:
        return self.states - 1

    @property
    def rate_bound(self) -> float:
        # out of z no faster than g_z / b_z: for a data token at most 1 on that clock; for the mask
        # 1 + decay s (1 - x) / (1 - s) with x = exp(-sigma), s = uniform x^decay, and decay (1 - x) <= 1 - x^decay <= 1 - s
        return 1.0 + self.config.uniform

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        uniform, fall = self.config.uniform, self.config.decay * sigma[:, None]
        share = uniform * torch.exp(-fall)
        rest = (1 - uniform) - uniform * torch.expm1(-fall)  # not 1 - share, a small difference where uniform is 1
        slope = self.config.decay * share
        masked = torch.arange(self.states, device=sigma.device) == self.mask
        return torch.where(masked, rest, share / self.data_tokens), torch.where(
            masked, slope, -slope / self.data_tokens
        )


class Absorb(Interpolating, kind="kernel"):
    """Every token falls to the mask (the last state) at rate 1 and stays there (D3PM absorbing; SEDD absorb; MDLM)."""

    # The family's formulas, with what is known to be 0 left out: unmasked positions have nothing to do, and need not have
    # scores that mean anything.

    clamp_safe = True
    masks_evenly = True

    class Config(ComponentConfig):
        pass

    @property
    def mask(self) -> int:
        return self.states - 1

    @property
    def rate_bound(self) -> float:
        return 1.0

    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        masked = torch.arange(self.states, device=sigma.device) == self.mask
        return masked.to(sigma.dtype)[None], sigma.new_zeros(1, 1)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
        return torch.where(hit & corrupt, self.mask, x0)

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        log_k = -log_expm1(sigma)[:, None]
        k = log_k.exp()
        masked = xt == self.mask
        # what is not masked has a fixed value here, so that neither it nor its gradient can overflow
        scores = log_score[..., : self.mask].masked_fill(~masked[..., None], 0.0)
        target = _at(scores, torch.where(masked, x0, 0))
        entropy = scores.exp().sum(-1) - k * target + k * (log_k - 1)
        return torch.where(masked, entropy, 0.0)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        cross_entropy = torch.where(xt == self.mask, -_at(log_x0, x0), 0.0)
        return cross_entropy / torch.expm1(sigma)[:, None]

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        return (log_x0 - log_expm1(sigma)[:, None, None]).scatter(-1, xt[..., None], 0.0)

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where((x == self.mask)[..., None], score, 0.0).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (expm(-dQ) s)_y P_d[z, y] at a masked z: expm1(d) s_y for data, and the rest of 1 for staying
        moved = torch.expm1(sigma - sigma_next)[:, None, None] * score
        moved = torch.where((x == self.mask)[..., None], moved, 0.0).scatter(-1, x[..., None], 0.0)
        return moved.scatter(-1, x[..., None], 1 - moved.sum(-1, keepdim=True))

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (alpha_s - alpha_t) / (1 - alpha_t)
        reveal = torch.exp(-sigma_next) * torch.expm1(sigma_next - sigma) / torch.expm1(-sigma)
        moved = torch.where((x == self.mask)[..., None], reveal[:, None, None] * x0_probs, 0.0)
        return moved.scatter(-1, x[..., None], 1 - torch.where(x == self.mask, reveal[:, None], 0.0)[..., None])
