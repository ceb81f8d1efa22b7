"""Samplers in steps of time: Euler, tau-leaping, analytic (Tweedie), ancestral, predictor-corrector and psi.

Their law is the model's as the steps grow in number: positions that move in one step do not know of each other. Axes: b
batch, l length, n states.
"""

from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import log1mexp
from sedd_graph.diffusion.tokens.sampler import StepSampler, StepsConfig
from sedd_graph.diffusion.tokens.walk import T_MIN, Walk


def rates(walk: Walk, t: Tensor, s: Tensor) -> Tensor:
    """Expected moves to each state within a step from ``t`` down to ``s``, [b, l, n], 0 at x itself."""
    length = (t - s) * walk.schedule.dsigma(t)
    return walk.kernel.reverse_rate(walk.score(t), walk.x, walk.schedule.sigma(t)) * length[:, None, None]


def analytic(walk: Walk, t: Tensor, s: Tensor | None) -> None:
    """One Tweedie step (SEDD, theorem 4.2), down to clean text where ``s`` is None."""
    sigma = walk.schedule.sigma(t)
    below = torch.zeros_like(sigma) if s is None else walk.schedule.sigma(s)
    walk.move(walk.kernel.analytic(walk.score(t), walk.x, sigma, below), final=s is None)


def ancestral(walk: Walk, t: Tensor, s: Tensor | None) -> None:
    """One draw from the posterior of the next state under the predicted clean token."""
    sigma = walk.schedule.sigma(t)
    below = torch.zeros_like(sigma) if s is None else walk.schedule.sigma(s)
    walk.move(walk.kernel.posterior(walk.clean(t), walk.x, sigma, below), final=s is None)


class Euler(StepSampler, kind="sampler"):
    """Euler steps of the reverse process: a token moves with chance rate x time (SEDD, arXiv 2310.16834, section 4.1)."""

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        pass

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is None:
            return analytic(walk, t, None)
        moves = rates(walk, t, s)
        return walk.move(moves.scatter(-1, walk.x[..., None], (1 - moves.sum(-1, keepdim=True)).clamp(min=0)))


class TauLeaping(StepSampler, kind="sampler"):
    """Tau-leaping: as many events as a Poisson law says, at the rates of the step's start (arXiv 2205.14987, section 4.3).

    Tokens have no order, so a position moves if it met one event; more than one are passed over and counted as clamped.
    """

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        pass

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is None:
            return analytic(walk, t, None)
        moves = rates(walk, t, s)
        events = torch.poisson(moves.sum(-1).double(), generator=walk.generator)
        walk.clamped += int(((events > 1) & walk.free).sum())
        return walk.put(walk.draw(events == 1, moves))


class Analytic(StepSampler, kind="sampler"):
    """Tweedie tau-leaping: the best step among those that treat positions apart (SEDD, arXiv 2310.16834, theorem 4.2)."""

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        pass

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        analytic(walk, t, s)


class Ancestral(StepSampler, kind="sampler"):
    """The posterior of the next state under the predicted clean token (D3PM; MDLM, arXiv 2406.07524, eq. 7).

    Under a kernel that only masks, all tokens at one rate, the step in which a mask falls does not depend on the network:
    it is drawn first, and the network is asked about the rows, steps and places in which one does.
    """

    reads = ("log_x0",)

    class Config(StepsConfig):
        pass

    def walk(self, walk: Walk, steps: int) -> None:
        if not walk.kernel.masks_evenly:
            return super().walk(walk, steps)
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64).float()
        hit = log1mexp(walk.schedule.sigma(times.double()))
        # a mask still stands after a step with chance (1 - alpha_s) / (1 - alpha_t): so it falls where the share of tokens
        # that are masked first goes below u times the one at the start
        never = steps + 1
        share = hit[0] + walk.uniform(*walk.x.shape).log()
        falls = torch.searchsorted(-hit[1:], -share, right=True).masked_fill(~walk.masked, never)
        left, start = falls, walk.x
        while bool((left < never).any()):
            now = left.amin(1)  # every row goes on to its own next step
            chosen = (left == now[:, None]) & (left < never)
            walk.reveal(chosen, times[now.clamp(max=steps)])
            left = left.masked_fill(chosen, never)
        for step in range(steps + 1):
            walk.shown(torch.where(falls <= step, walk.x, start))
        return None

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        ancestral(walk, t, s)


class PredictorCorrector(StepSampler, kind="sampler"):
    """Analytic steps, each followed by Gibbs sampling at the noise level reached (after arXiv 2205.14987, section 4.4).

    A correction takes ``sites`` free positions at random and draws each anew from its law given all others, p_t(x_i | x_-i),
    which the scores are up to a factor. With one site the marginal law of that level is left exactly as it is, so errors of
    the steps are undone; several sites at once do not know of each other.
    """

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        corrections: Annotated[int, pydantic.Field(ge=1, le=1000)] = 1
        sites: Annotated[int, pydantic.Field(ge=1)] = 1

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        analytic(walk, t, s)
        if s is not None:
            for _ in range(self.config.corrections):
                self._correct(walk, s)

    def _correct(self, walk: Walk, t: Tensor) -> None:
        keys = walk.uniform(*walk.x.shape).masked_fill(~walk.free, 2.0)
        chosen = (keys.argsort(-1).argsort(-1) < self.config.sites) & walk.free
        if walk.kernel.mask is not None:
            # a score is asked for under a mask alone: forget the token, then draw whether and what it is
            walk.remask(chosen.double())
        score = walk.score(t)
        walk.move(score / score.sum(-1, keepdim=True), only=chosen)


class Psi(StepSampler, kind="sampler"):
    """Psi-samplers: each token takes the ancestral step or, with chance 1 - kappa, is denoised and noised anew (arXiv 2602.21185).

    Every step keeps the marginals of the noise process; kappa = 1 is the ancestral sampler. With a mask, this is remasking.
    """

    reads = ("log_x0",)

    class Config(StepsConfig):
        kappa: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.95

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        anew = walk.uniform(*walk.x.shape) > self.config.kappa
        if s is None or not bool(anew.any()):
            return ancestral(walk, t, s)
        sigma, below = walk.schedule.sigma(t), walk.schedule.sigma(s)
        clean, start = walk.clean(t), walk.x
        # the two kinds of positions are apart, and both look at the rows of the start
        walk.move(walk.kernel.posterior(clean, start, sigma, below), only=~anew)
        walk.move(walk.kernel.posterior(clean, start, sigma, torch.zeros_like(sigma)), only=anew, final=True)
        return walk.noise(anew, below)
