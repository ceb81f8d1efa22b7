"""Base class of interpolating kernels, which retain a token or replace it by a draw that does not depend on the token.

The transition matrix, with one column per clean token, is P(sigma) = alpha I + (1 - alpha) pi 1^T. Here alpha =
exp(-sigma), and pi is the replacement distribution (GIDD, arXiv 2503.04482). Sigma is in the unit of SEDD's code: a
token is replaced at rate 1 per unit of sigma, and the replacement may be the same token. Only ``rate_matrix`` and
``transition_matrix``, which serve numerical verification, allocate n x n tables. Axes: b batch, l length, n states.
"""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.categorical import inverse_cdf
from sedd_graph.diffusion.numerics import take, tiny
from sedd_graph.diffusion.tokens.kernel import Kernel, Replacement

__all__ = ["Interpolating"]


def _entry(vector: Tensor, index: Tensor) -> Tensor:
    """Return the entry of ``vector`` [b or 1, n] at ``index`` [b, l], shape [b, l]."""
    return vector.expand(index.shape[0], -1).gather(1, index)


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """Draw states from ``weights`` [b or 1, n] by uniform numbers ``u`` float64 [b, l]: int64 [b, l]."""
    cdf = weights.double().cumsum(-1)
    return inverse_cdf(cdf[0] if len(cdf) == 1 else cdf, u)


class Interpolating(Kernel):
    """Base class of kernels with transition matrix P = alpha I + (1 - alpha) pi 1^T, where alpha = exp(-sigma).

    The replacement distribution pi may depend on sigma. Subclasses define ``mask``, the index of the mask state or
    None, and :meth:`target`, which returns pi and its derivative. The transition rates that follow (:meth:`rate`) must
    not be negative, since no such Markov process exists otherwise; the check ``kernel.rates`` verifies this.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def target(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the replacement distribution pi at total noise sigma and its derivative in sigma.

        Args:
            sigma: Total noise, [b].

        Returns:
            The distribution pi, [b, n] or [1, n], each row of sum 1; and d pi / d sigma, of a shape that broadcasts
            against pi.
        """

    def rate(self, sigma: Tensor) -> Tensor:
        """Return the transition rate into each state, which does not depend on the current state.

        The rate is pi + (1 - exp(-sigma)) d pi / d sigma, where pi is the replacement distribution.

        Args:
            sigma: Total noise, [b].

        Returns:
            Rates per unit of sigma, [b, n] or [1, n].
        """
        pi, slope = self.target(sigma)
        return pi - torch.expm1(-sigma)[:, None] * slope

    def _replaced(self, sigma: Tensor) -> Tensor:
        """Return (1 - alpha) pi, [b, n]."""
        return -torch.expm1(-sigma)[:, None] * self.target(sigma)[0]

    def _marginal(self, x0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha [b, 1], (1 - alpha) pi [b, n] and P[x0, x0] [b, l], which give q(x_t | x0)."""
        alpha, replaced = torch.exp(-sigma)[:, None], self._replaced(sigma)
        return alpha, replaced, alpha + _entry(replaced, x0)

    def _mixed(self, x0_probs: Tensor, sigma: Tensor) -> Tensor:
        """Return q(x_t) = alpha xhat + (1 - alpha) pi, where xhat is the prediction of the clean token.

        The result is [b, l, n], clamped above 0.
        """
        replaced = self._replaced(sigma)
        mixed = torch.exp(-sigma)[:, None, None] * x0_probs + replaced[:, None]
        return mixed.clamp(min=tiny(mixed))

    def _between(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Return a [b, 1] and c [b or 1, n] of the kernel a I + c 1^T from noise ``sigma_next`` up to ``sigma``."""
        step = (sigma - sigma_next)[:, None]
        now, before = self.target(sigma)[0], self.target(sigma_next)[0]
        keep = torch.exp(-step)
        moved = -keep * torch.expm1(-sigma_next)[:, None] * (now - before)
        return keep, (moved - torch.expm1(-step) * now).clamp(min=0)

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
        u = random.rand48(*x0.shape)
        return torch.where(hit & corrupt, _draw(self.target(sigma)[0], u), x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        u = torch.rand(rows, length, generator=generator, device=generator.device, dtype=torch.float64)
        weights = self.target(torch.full((1,), 1e4, device=generator.device))[0]
        if allowed is not None:
            states = allowed.clone()
            if self.mask is not None:
                states[self.mask] = True
            kept = weights * states
            weights = kept if bool(kept.sum() > 0) else states[None].to(weights.dtype)
        return _draw(weights, u)

    def prior_divergence(self, x0: Tensor, sigma: Tensor) -> Tensor:
        # every state but x0 has the probability (1 - alpha) pi: one sum over the states serves all positions
        sigma = sigma.double()
        prior = self.target(torch.full_like(sigma[:1], 1e4))[0]
        _, replaced, top = self._marginal(x0, sigma)
        terms = torch.xlogy(replaced, replaced) - torch.xlogy(replaced, prior)
        own = torch.xlogy(top, top) - torch.xlogy(top, _entry(prior, x0))
        nats = terms.sum(-1, keepdim=True) - _entry(terms, x0) + own
        return torch.where(_entry(prior, x0) == 0, torch.inf, nats)

    def rate_matrix(self, sigma: float) -> Tensor:
        into = self.rate(torch.tensor([sigma], dtype=torch.float64))[0].expand(self.states)
        return into[:, None] - torch.diag(into.sum().expand(self.states))

    def transition_matrix(self, sigma: float | Tensor, start: float = 0.0) -> Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64)
        flat = level.reshape(-1)
        keep, into = self._between(flat, torch.full_like(flat, start))
        out = keep[..., None] * torch.eye(self.states, dtype=torch.float64) + into[..., None]
        return out.reshape(*level.shape, self.states, self.states)

    def replacement(self, sigma: float, start: float = 0.0) -> Replacement:
        keep, into = self._between(*(torch.tensor([x], dtype=torch.float64) for x in (sigma, start)))
        into = into.expand(1, self.states)[0]
        return Replacement(keep[0].expand(self.states), into / into.sum().clamp(min=tiny(into)))

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        # sum over y != z = x_t of g_z (s_y - r_y log s_y + K(r_y)), with g the rate, r_y = q_y / q_z and
        # q = alpha e_x0 + (1 - alpha) pi
        alpha, replaced, top = self._marginal(x0, sigma)
        same = xt == x0
        here = torch.where(same, top, _entry(replaced, xt)).clamp(min=tiny(top))
        log_score = log_score.scatter(-1, xt[..., None], 0.0)
        positive = log_score.exp().scatter(-1, xt[..., None], 0.0).sum(-1)
        linear = (log_score @ replaced[..., None])[..., 0] + alpha * take(log_score, x0)
        logs = torch.xlogy(replaced, replaced)
        others = logs.sum(-1, keepdim=True) - _entry(logs, xt)
        others = others + torch.where(same, 0.0, torch.xlogy(top, top) - _entry(logs, x0))
        away = replaced.sum(-1, keepdim=True) - _entry(replaced, xt) + torch.where(same, 0.0, alpha)
        constant = others - (torch.log(here) + 1) * away
        return _entry(self.rate(sigma), xt) * (positive + (constant - linear) / here)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        # g_z / q_z [KL(q || qhat) + q_z / qhat_z - 1 - log(q_z / qhat_z)]: the score entropy of normalised scores
        _, replaced, top = self._marginal(x0, sigma)
        log_mixed = torch.log(self._mixed(log_x0.exp(), sigma))
        log_replaced, at_x0 = torch.log(replaced.clamp(min=tiny(replaced))), take(log_mixed, x0)
        # summed state by state: at a large vocabulary the two sums of logarithms would cancel almost entirely
        kl = (replaced[:, None] * (log_replaced[:, None] - log_mixed)).sum(-1)
        kl = kl - _entry(replaced, x0) * (_entry(log_replaced, x0) - at_x0) + top * (torch.log(top) - at_x0)
        here = torch.where(xt == x0, top, _entry(replaced, xt)).clamp(min=tiny(top))
        gap = torch.log(here) - take(log_mixed, xt)
        return _entry(self.rate(sigma), xt) / here * (kl + torch.expm1(gap) - gap)

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        log_mixed = torch.log(self._mixed(log_x0.exp(), sigma))
        return log_mixed - log_mixed.gather(-1, xt[..., None])

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return (_entry(self.rate(sigma), x)[..., None] * score).scatter(-1, x[..., None], 0.0)

    def _joint(self, before: Tensor, x: Tensor, keep: Tensor, into: Tensor) -> Tensor:
        """Return P[x, y] times ``before`` [b, l, n] at each y, where P = keep I + into 1^T."""
        arriving = _entry(into, x)[..., None]
        stay = before.gather(-1, x[..., None]) * (keep[..., None] + arriving)
        return (before * arriving).scatter(-1, x[..., None], stay)

    def amplification(self, sigma: Tensor, sigma_next: Tensor) -> float:
        step = sigma - sigma_next
        return math.exp(min(float(step.max()), 700.0)) if step.numel() else 1.0

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (P^-1 s)_y P[z, y], P = a I + c 1^T, P^-1 = (I - c 1^T) / a
        keep, into = self._between(sigma, sigma_next)
        before = (score - into[:, None] * score.sum(-1, keepdim=True)) / keep[..., None]
        return self._joint(before, x, keep, into)

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # Bayes: P[z, y] q_next(y) / q(z), q the distribution of x_t under the prediction
        weights = self._joint(self._mixed(x0_probs, sigma_next), x, *self._between(sigma, sigma_next))
        return weights / weights.sum(-1, keepdim=True).clamp(min=tiny(weights))
