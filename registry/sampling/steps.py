"""Samplers in time steps: Euler, tau-leaping, analytic (Tweedie), ancestral, predictor-corrector and psi.

Their distribution is the model's in the limit of many steps: positions that move in one step are drawn independently. Axes: b
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
    """Return the expected number of moves to each state in a step from ``t`` down to ``s`` [b], [b, l, n]; 0 at x itself."""
    length = (t - s) * walk.schedule.dsigma(t)
    return walk.kernel.reverse_rate(walk.score(t), walk.x, walk.schedule.sigma(t)) * length[:, None, None]


def analytic(walk: Walk, t: Tensor, s: Tensor | None) -> None:
    """Take one Tweedie step (SEDD, theorem 4.2) from ``t`` to ``s`` [b], or to clean text if ``s`` is None."""
    sigma = walk.schedule.sigma(t)
    below = torch.zeros_like(sigma) if s is None else walk.schedule.sigma(s)
    walk.move(walk.kernel.analytic(walk.score(t), walk.x, sigma, below), final=s is None)


def ancestral(walk: Walk, t: Tensor, s: Tensor | None) -> None:
    """Draw the state at ``s`` [b] from its posterior under the predicted clean token; clean text if ``s`` is None."""
    sigma = walk.schedule.sigma(t)
    below = torch.zeros_like(sigma) if s is None else walk.schedule.sigma(s)
    walk.move(walk.kernel.posterior(walk.clean(t), walk.x, sigma, below), final=s is None)


class Euler(StepSampler, kind="sampler"):
    """Euler steps of the reverse process: a token moves with probability rate times duration (SEDD, arXiv 2310.16834, section 4.1)."""

    reads = ("log_score", "log_x0")

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is None:
            return analytic(walk, t, None)
        moves = rates(walk, t, s)
        return walk.move(moves.scatter(-1, walk.x[..., None], (1 - moves.sum(-1, keepdim=True)).clamp(min=0)))


class TauLeaping(StepSampler, kind="sampler"):
    """Tau-leaping: the number of events is Poisson, at the rates of the start of the step (arXiv 2205.14987, section 4.3).

    Tokens have no order, so a position moves if it has exactly one event; more than one are ignored and counted as clamped.
    """

    reads = ("log_score", "log_x0")

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is None:
            return analytic(walk, t, None)
        moves = rates(walk, t, s)
        events = torch.poisson(moves.sum(-1).double(), generator=walk.generator)
        walk.clamped += int(((events > 1) & walk.free).sum())
        return walk.put(walk.draw(events == 1, moves))


class Analytic(StepSampler, kind="sampler"):
    """Tweedie tau-leaping: the optimal step among those that draw positions independently (SEDD, arXiv 2310.16834, theorem 4.2)."""

    reads = ("log_score", "log_x0")

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        analytic(walk, t, s)


class Ancestral(StepSampler, kind="sampler"):
    """Draws from the posterior of the next state under the predicted clean token (D3PM; MDLM, arXiv 2406.07524, eq. 7).

    Under a kernel that only masks, all tokens at one rate, the step in which a mask is removed is independent of the network. These
    steps are drawn first, and the network evaluates only the rows, steps and positions at which a mask is removed.
    """

    reads = ("log_x0",)

    def walk(self, walk: Walk, steps: int) -> None:
        if not walk.kernel.masks_evenly:
            return super().walk(walk, steps)
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64).float()
        hit = log1mexp(walk.schedule.sigma(times.double()))
        # a mask remains after a step with probability (1 - alpha_s) / (1 - alpha_t), so it is removed where the masked share
        # first falls below u times the initial one
        never = steps + 1
        share = hit[0] + walk.uniform(*walk.x.shape).log()
        falls = torch.searchsorted(-hit[1:], -share, right=True).masked_fill(~walk.masked, never)
        left, start = falls, walk.x
        while bool((left < never).any()):
            now = left.amin(1)  # the next step of each row
            chosen = (left == now[:, None]) & (left < never)
            walk.reveal(chosen, times[now.clamp(max=steps)])
            left = left.masked_fill(chosen, never)
        for step in range(steps + 1):
            walk.end_step(torch.where(falls <= step, walk.x, start))
        return None

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        ancestral(walk, t, s)


class PredictorCorrector(StepSampler, kind="sampler"):
    """Analytic steps, each followed by Gibbs sampling at the noise level reached (after arXiv 2205.14987, section 4.4).

    A correction draws ``sites`` random free positions from their distribution given all others, p_t(x_i | x_-i), which is
    proportional to the scores. With one site the marginal distribution of the noise level is invariant, so that corrections
    reduce the error of the steps; several sites are drawn independently.
    """

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        corrections: Annotated[int, pydantic.Field(ge=1, le=1000)] = 1
        """Corrections after each step, from 1 to 1,000."""
        sites: Annotated[int, pydantic.Field(ge=1)] = 1
        """Positions that one correction draws, at least 1."""

    config: Config

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        analytic(walk, t, s)
        if s is not None:
            for _ in range(self.config.corrections):
                self._correct(walk, s)

    def _correct(self, walk: Walk, t: Tensor) -> None:
        keys = walk.uniform(*walk.x.shape).masked_fill(~walk.free, 2.0)
        chosen = (keys.argsort(-1).argsort(-1) < self.config.sites) & walk.free
        if walk.kernel.mask is not None:
            # scores are known at masks alone: mask the position, then draw whether it is unmasked, and to which token
            walk.remask(chosen.double())
        score = walk.score(t)
        walk.move(score / score.sum(-1, keepdim=True), only=chosen)


class Psi(StepSampler, kind="sampler"):
    """Psi-samplers: each token takes the ancestral step or, with probability 1 - kappa, is denoised and noised again (arXiv 2602.21185).

    Every step preserves the marginals of the noise process. With a mask, this is remasking.
    """

    reads = ("log_x0",)

    class Config(StepsConfig):
        kappa: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.95
        """Probability of the ancestral step, from 0 to 1. 1: the ancestral sampler."""

    config: Config

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        anew = walk.uniform(*walk.x.shape) > self.config.kappa
        if s is None or not bool(anew.any()):
            return ancestral(walk, t, s)
        sigma, below = walk.schedule.sigma(t), walk.schedule.sigma(s)
        clean, start = walk.clean(t), walk.x
        # the two sets of positions are disjoint, and both move from the rows before the step
        walk.move(walk.kernel.posterior(clean, start, sigma, below), only=~anew)
        walk.move(walk.kernel.posterior(clean, start, sigma, torch.zeros_like(sigma)), only=anew, final=True)
        return walk.noise(anew, below)
