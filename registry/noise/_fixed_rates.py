"""Base class of kernels with a constant rate matrix Q, whose transition matrix is P = exp(sigma Q).

Q is scaled so that its slowest mode decays as exp(-sigma), as under the kernel ``uniform``. The unit of the given rates
therefore has no effect, and at the end of a schedule the distance from the prior is of the order of exp(-sigma(1)).
Axes: b batch, l length, n states.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import tiny
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["FixedRates"]


class FixedRates(Kernel):
    """Base class of kernels whose rate matrix Q does not depend on sigma.

    Subclasses define columns, rows and matrix-vector products of P = exp(sigma Q), and rows of Q. All other formulas
    follow from these.
    """

    abstract: ClassVar[bool] = True
    mask = None

    @abstractmethod
    def _columns(self, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the distribution of x_t given ``x0`` [b, l]: columns of P, [b, l, n], never below 0."""

    @abstractmethod
    def _rows(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the probability of reaching ``x`` [b, l] from each state: rows of P, [b, l, n], never below 0."""

    @abstractmethod
    def _product(self, weights: Tensor, sigma: Tensor) -> Tensor:
        """Return P times ``weights`` [b, l, n]; ``sigma`` [b] may be negative, which applies the inverse."""

    @abstractmethod
    def _rates_into(self, x: Tensor, like: Tensor) -> Tensor:
        """Return rates Q[x, y] from each state y into ``x`` [b, l], [b, l, n], with the dtype of ``like``.

        Callers ignore the entries at y = x.
        """

    def _prior_law(self) -> Tensor:
        """Return the prior, float64 [n]: by default uniform, as under symmetric rates."""
        return torch.full((self.states,), 1 / self.states, dtype=torch.float64)

    def prior_divergence(self, x0: Tensor, sigma: Tensor) -> Tensor:
        seen = self._columns(x0, sigma.double())
        return (torch.xlogy(seen, seen) - torch.xlogy(seen, self._prior_law().to(seen.device))).sum(-1)

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        return self._entropy(log_score, xt, x0, sigma).to(log_score.dtype)

    def _entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        """Return the score entropy with the dtype of P, which may be float64."""
        seen = self._columns(x0, sigma)
        ratio = seen / seen.gather(-1, xt[..., None]).clamp(min=tiny(seen))
        into = self._rates_into(xt, seen).scatter(-1, xt[..., None], 0.0)
        log_score = log_score.to(seen.dtype).scatter(-1, xt[..., None], 0.0)
        # s - r log s + r log r - r = r (exp(d) - 1 - d) with d = log s - log r: near d = 0 the left side would cancel
        d = log_score - torch.log(ratio.clamp(min=tiny(seen)))
        near = d.abs() < 1
        close = ratio * (torch.expm1(torch.where(near, d, 0.0)) - torch.where(near, d, 0.0))
        far = log_score.exp() - ratio * (d + 1)
        return (into * torch.where(near, close, far)).sum(-1)

    def _mixed(self, x0_probs: Tensor, sigma: Tensor) -> Tensor:
        """Return the distribution of x_t under a prediction of the clean token, [b, l, n], clamped above 0."""
        mixed = self._product(x0_probs, sigma)
        return mixed.clamp(min=tiny(mixed))

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        return self._log_score(log_x0, xt, sigma).to(log_x0.dtype)

    def _log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """Return the log-score with the dtype of P, which may be float64."""
        mixed = self._mixed(log_x0.exp(), sigma).log()
        return mixed - mixed.gather(-1, xt[..., None])

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        return self._entropy(self._log_score(log_x0, xt, sigma), xt, x0, sigma).to(log_x0.dtype)

    def reverse_rate(self, score: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return (self._rates_into(x, score) * score).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        step = sigma - sigma_next
        return (self._product(score, -step) * self._rows(x, step)).to(score.dtype)

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        weights = self._rows(x, sigma - sigma_next) * self._mixed(x0_probs, sigma_next)
        return (weights / weights.sum(-1, keepdim=True)).to(x0_probs.dtype)
