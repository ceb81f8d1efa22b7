"""Noise kernels: absorbing (masking) and uniform (substitution), in SEDD's normalisation.

Axes: b batch, l length, n states. The uniform rate off the diagonal is 1/n, as in SEDD's code; its paper's equation 15
runs n times faster.
"""

import math

import torch
from torch import Tensor

from sedd_graph.component import ComponentConfig
from sedd_graph.diffusion.numerics import log1mexp, log_expm1
from sedd_graph.diffusion.process import Kernel
from sedd_graph.diffusion.roles import Randomness


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[..., None])[..., 0]


class Absorb(Kernel, kind="kernel"):
    """Every token falls to the mask (the last state) at rate 1 and stays there (D3PM absorbing; SEDD absorb; MDLM)."""

    clamp_safe = True

    class Config(ComponentConfig):
        pass

    @property
    def mask(self) -> int:
        return self.states - 1

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
        return torch.where(hit & corrupt, self.mask, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        return torch.full((rows, length), self.mask, dtype=torch.int64, device=generator.device)

    def rate_matrix(self) -> Tensor:
        rates = -torch.eye(self.states, dtype=torch.float64)
        rates[self.mask] += 1.0
        return rates

    def transition_matrix(self, sigma: float) -> Tensor:
        keep = torch.tensor(-sigma, dtype=torch.float64).exp()
        out = keep * torch.eye(self.states, dtype=torch.float64)
        out[self.mask] += 1 - keep
        return out

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

    def reverse_rate(self, score: Tensor, x: Tensor) -> Tensor:
        return torch.where((x == self.mask)[..., None], score, 0.0).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, step: Tensor) -> Tensor:
        # (expm(-dQ) s)_y P_d[z, y] at a masked z: expm1(d) s_y for data, and the rest of 1 for staying
        moved = torch.expm1(step)[:, None, None] * score
        moved = torch.where((x == self.mask)[..., None], moved, 0.0).scatter(-1, x[..., None], 0.0)
        return moved.scatter(-1, x[..., None], 1 - moved.sum(-1, keepdim=True))

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # (alpha_s - alpha_t) / (1 - alpha_t)
        reveal = torch.exp(-sigma_next) * torch.expm1(sigma_next - sigma) / torch.expm1(-sigma)
        moved = torch.where((x == self.mask)[..., None], reveal[:, None, None] * x0_probs, 0.0)
        return moved.scatter(-1, x[..., None], 1 - torch.where(x == self.mask, reveal[:, None], 0.0)[..., None])


class Uniform(Kernel, kind="kernel"):
    """Every token is replaced at rate 1 by one drawn evenly from all (it may hit itself)."""

    class Config(ComponentConfig):
        pass

    @property
    def mask(self) -> None:
        return None

    def sample(self, x0: Tensor, sigma: Tensor, *, random: Randomness, corrupt: Tensor) -> Tensor:
        hit = random.rand(*x0.shape) < -torch.expm1(-sigma)[:, None]
        token = (random.rand(*x0.shape).double() * self.states).long().clamp(max=self.states - 1)
        return torch.where(hit & corrupt, token, x0)

    def prior(self, rows: int, length: int, *, generator: torch.Generator, allowed: Tensor | None) -> Tensor:
        u = torch.rand(rows, length, generator=generator, device=generator.device, dtype=torch.float64)
        if allowed is None:
            return (u * self.states).long()
        choices = allowed.nonzero()[:, 0]
        return choices[(u * len(choices)).long()]

    def rate_matrix(self) -> Tensor:
        n = self.states
        return torch.full((n, n), 1 / n, dtype=torch.float64) - torch.eye(n, dtype=torch.float64)

    def transition_matrix(self, sigma: float) -> Tensor:
        n, keep = self.states, torch.tensor(-sigma, dtype=torch.float64).exp()
        return keep * torch.eye(n, dtype=torch.float64) + (1 - keep) / n

    def score_entropy(self, log_score: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        n = self.states
        e = torch.expm1(sigma)[:, None]
        ratio = e / (e + n)  # SEDD's code writes 1 - n/(e + n), which is 0 in float32 at n = 50257, sigma <= 1e-3: NaN
        same = xt == x0
        log_score = log_score.scatter(-1, xt[..., None], 0.0)
        # the sums leave out y = x_t, whose term is exp(0) = 1 in the first and 0 in the second
        positive = (log_score.exp().sum(-1) - 1) / n
        logs = log_score.sum(-1) / n
        at_x0 = _at(log_score, x0)
        log_ratio = torch.log(e) - torch.log(e + n)
        if_same = positive - ratio * logs + (n - 1) / n * ratio * (log_ratio - 1)
        # K(1/r) = (1/r)(-log r - 1)
        if_moved = positive - logs - at_x0 / e + ((-log_ratio - 1) / ratio - (n - 2)) / n
        return torch.where(same, if_same, if_moved)

    def nelbo(self, log_x0: Tensor, xt: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
        # math: g/q_z [KL(q || qhat) + q_z/qhat_z - 1 - log(q_z/qhat_z)], q = alpha 1[x0] + (1-alpha)/n, g = 1/n per unit sigma
        n = self.states
        alpha, hit = torch.exp(-sigma)[:, None], -torch.expm1(-sigma)[:, None]
        floor = hit / n
        log_qhat = torch.log(alpha[..., None] * log_x0.exp() + floor[..., None])
        log_floor = log1mexp(sigma)[:, None] - math.log(n)
        log_top = torch.log(alpha + floor)
        top, at_x0, at_xt = alpha + floor, _at(log_qhat, x0), _at(log_qhat, xt)
        kl = floor * (n * log_floor - log_qhat.sum(-1) - (log_floor - at_x0)) + top * (log_top - at_x0)
        log_qz = torch.where(xt == x0, log_top, log_floor)
        gap = log_qz - at_xt
        return (torch.exp(-log_qz) / n) * (kl + torch.expm1(gap) - gap)

    def log_score(self, log_x0: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        alpha, floor = torch.exp(-sigma)[:, None, None], -torch.expm1(-sigma)[:, None, None] / self.states
        log_q = torch.log(alpha * log_x0.exp() + floor)
        return log_q - log_q.gather(-1, xt[..., None])

    def reverse_rate(self, score: Tensor, x: Tensor) -> Tensor:
        return (score / self.states).scatter(-1, x[..., None], 0.0)

    def analytic(self, score: Tensor, x: Tensor, step: Tensor) -> Tensor:
        n, d = self.states, step[:, None, None]
        staggered = score * d.exp() - torch.expm1(d) / n * score.sum(-1, keepdim=True)
        spread = (-torch.expm1(-d) / n).expand_as(staggered)
        here = spread.gather(-1, x[..., None]) + torch.exp(-d)
        return staggered * spread.scatter(-1, x[..., None], here)

    def posterior(self, x0_probs: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        # UDLM/Duo, with xhat the leave-one-out posterior
        n = self.states
        a_t, a_s = torch.exp(-sigma)[:, None, None], torch.exp(-sigma_next)[:, None, None]
        gap = -a_s * torch.expm1(sigma_next - sigma)[:, None, None]  # alpha_s - alpha_t
        ratio = torch.exp(sigma_next - sigma)[:, None, None]
        here = x0_probs.gather(-1, x[..., None])
        top = gap * x0_probs + (1 - ratio) * (1 - a_s) / n
        top = top.scatter_add(-1, x[..., None], n * a_t * here + ratio - a_t)
        return top / (n * a_t * here + 1 - a_t)
