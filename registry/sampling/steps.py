"""Samplers with time steps: Euler, tau-leaping, analytic (Tweedie), ancestral, predictor-corrector and psi.

Within a step all positions change independently, so samples have the model's distribution only in the limit of many
steps. Axes: b batch, l length, n states.
"""

from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import log1mexp
from sedd_graph.diffusion.tokens.sampler import PositionsConfig, StepSampler, Stepwise
from sedd_graph.diffusion.tokens.tweedie import tweedie
from sedd_graph.diffusion.tokens.walk import T_MIN, NextStates, Walk


def rates(walk: Walk, t: Tensor, s: Tensor) -> NextStates:
    """Return the expected number of transitions to each state in a step: reverse rate times (t - s) d sigma / dt.

    Args:
        walk: State of the sampling run, with the rows x.
        t: Time at the start of the step, [b].
        s: Time at the end of the step, below ``t``, [b].

    Returns:
        Function from outputs at positions, the tokens there and their rows to the numbers, [g, m, n], for each position and
        each state; 0 at the current state of a position.
    """
    sigma, length = walk.schedule.sigma(t), (t - s) * walk.schedule.dsigma(t)

    def law(found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor) -> Tensor:
        score = walk.score_of(found, x, sigma[row])
        return walk.kernel.reverse_rate(score, x, sigma[row]) * length[row, None, None]

    return law


def analytic(walk: Walk, t: Tensor, s: Tensor | None) -> None:
    """Take one Tweedie step of the reverse process, in place (SEDD, arXiv 2310.16834, theorem 4.2).

    Args:
        walk: State of the sampling run, whose rows are updated.
        t: Time at the start of the step, [b].
        s: Time at the end of the step, [b]; None: the step ends at clean text.

    Raises:
        UserError: The step is too long for the kernel, so that rounding errors exceed the probabilities.
    """
    level = walk.schedule.sigma(t)
    below = torch.zeros_like(level) if s is None else walk.schedule.sigma(s)
    precise = walk.needs_float64(level, below)

    def law(found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor) -> Tensor:
        now, after = level[row], below[row]
        score = walk.score_of(found, x, now, precise=precise)
        # the steps of other kernels amplify no errors
        unit = torch.finfo(found["log_score"].dtype).eps if precise and "log_score" in found else 0.0
        length = None if place.shape[1] == walk.x.shape[1] else walk.x.shape[1]
        return tweedie(walk.kernel, score, x, now, after, unit=unit, length=length, report=walk.report_rounding)

    walk.advance(walk.outputs(t), law, final=s is None)


def posterior(walk: Walk, sigma: Tensor, below: Tensor) -> NextStates:
    """Return q(x_s | x_t, x_0), averaged over the predicted clean token x_0, as a function of outputs at positions.

    Args:
        walk: State of the sampling run.
        sigma: Total noise at t, [b].
        below: Total noise at s, [b].
    """

    def law(found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor) -> Tensor:
        return walk.kernel.posterior(walk.clean_of(found, x), x, sigma[row], below[row])

    return law


def ancestral(walk: Walk, t: Tensor, s: Tensor | None) -> None:
    """Take one ancestral step, in place: draw x_s from q(x_s | x_t, x_0), averaged over the predicted clean token x_0.

    Args:
        walk: State of the sampling run, whose rows are updated.
        t: Time at the start of the step, [b].
        s: Time at the end of the step, [b]; None: the step ends at clean text.
    """
    sigma = walk.schedule.sigma(t)
    below = torch.zeros_like(sigma) if s is None else walk.schedule.sigma(s)
    walk.advance(walk.outputs(t), posterior(walk, sigma, below), final=s is None)


class Euler(StepSampler, kind="sampler"):
    """Euler sampler: a token changes with probability reverse rate times step length (SEDD, section 4.1).

    The step length is measured in total noise sigma. SEDD is arXiv 2310.16834.
    """

    reads = ("log_score", "log_x0")
    exact_alone = False
    takes_all = True
    Config = PositionsConfig
    config: PositionsConfig

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is None:
            return analytic(walk, t, None)
        rate = rates(walk, t, s)

        def law(found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor) -> Tensor:
            moves = rate(found, x, row, place)
            return moves.scatter(-1, x[..., None], (1 - moves.sum(-1, keepdim=True)).clamp(min=0))

        return walk.advance(walk.outputs(t), law)


class TauLeaping(StepSampler, kind="sampler"):
    """Tau-leaping sampler: draws a Poisson number of events per position and step (arXiv 2205.14987, section 4.3).

    The rates are those at the start of the step. Tokens are not ordinal, so events at one position cannot be added up:
    a position changes if it has exactly one event. Positions with more events do not change and are counted in
    ``clamped``.
    """

    reads = ("log_score", "log_x0")
    exact_alone = False
    takes_all = True

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        if s is None:
            return analytic(walk, t, None)
        rate = rates(walk, t, s)

        def law(found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor) -> tuple[tuple[Tensor], Tensor]:
            moves = rate(found, x, row, place)
            return (moves.sum(-1),), moves

        (total,), weights = walk.scan(walk.outputs(t), law, given=True)  # the numbers of events are drawn everywhere
        # NaN and infinite rates are refused by Walk.draw; torch.poisson must not meet them
        events = walk.draws.poisson(total.double().nan_to_num(nan=0.0, posinf=0.0), walk.x)
        walk.count_clamped((events > 1) & walk.free)
        return walk.put(walk.draw((events == 1).double(), weights))


class Analytic(StepSampler, kind="sampler"):
    """Analytic sampler (Tweedie tau-leaping): the optimal step with independent positions (SEDD, theorem 4.2).

    SEDD is arXiv 2310.16834.
    """

    reads = ("log_score", "log_x0")
    takes_all = True
    Config = PositionsConfig
    config: PositionsConfig

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        analytic(walk, t, s)


class Ancestral(Stepwise, StepSampler, kind="sampler"):
    """Ancestral sampler: draws x_s from q(x_s | x_t, x_0), averaged over the predicted clean token x_0 (D3PM; MDLM).

    The formula is eq. 7 of MDLM (arXiv 2406.07524). Under a kernel that only masks, at one rate for all tokens, the
    step in which each position is unmasked does not depend on the network. These steps are drawn first, and the network
    is evaluated only for the rows, steps and positions that are unmasked. (A probability that a prediction gives the
    mask, as D3PM's logits may, is ignored there.)

    Under a kernel in discrete time with T steps, ``steps`` is at most T, and a step that skips some of the kernel's has
    the product of their matrices.
    """

    reads = ("log_x0",)
    discrete = True
    takes_all = True
    Config = PositionsConfig
    config: PositionsConfig

    def walk(self, walk: Walk, steps: int) -> None:
        if not walk.kernel.masks_evenly:
            return super().walk(walk, steps)
        (falls,), start = self.begin(walk, steps), walk.x
        left, more, shown = falls, True, 0
        while more:
            left, more = self._reveal(walk, left, steps)
            if walk.watched:
                over = int(walk.told[0])  # steps that no row has before it any more
                for step in range(shown, over):
                    walk.show_step(torch.where(falls <= step, walk.x, start))
                shown = over
        return None

    def _times(self, walk: Walk, steps: int) -> Tensor:
        """Return the times between which the steps are, under a kernel that only masks: float32 [steps + 1]."""
        return torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64).float()

    def begin(self, walk: Walk, steps: int) -> tuple[Tensor, ...]:
        """Return the step in which each mask is removed, int64 [b, l], ``steps`` + 1 where there is no mask.

        The kernel must be one that only masks, all tokens at one rate.
        """
        hit = log1mexp(walk.schedule.sigma(self._times(walk, steps).double()))
        if self.config.spread:
            falls, left = torch.full_like(walk.x, steps + 1), walk.masked
            for number, chance in enumerate(-torch.expm1(hit.diff())):
                now = walk.going(chance * left)
                falls, left = falls.masked_fill(now, number), left & ~now
            return (falls.masked_fill(left, steps),)
        # a mask remains after a step with probability (1 - alpha_s) / (1 - alpha_t), so it is removed where the masked share
        # first falls below u times the initial one
        share = hit[0] + walk.uniform(*walk.x.shape).log()
        return (torch.searchsorted(-hit[1:], -share, right=True).masked_fill(~walk.masked, steps + 1),)

    def advance(self, walk: Walk, kept: tuple[Tensor, ...], number: int, steps: int) -> tuple[Tensor, ...]:
        return (self._reveal(walk, kept[0], steps)[0],)

    def _reveal(self, walk: Walk, left: Tensor, steps: int) -> tuple[Tensor, bool]:
        """Remove the masks of the next step of each row.

        Args:
            walk: State of the sampling run, whose rows are updated.
            left: The step in which each mask is removed, int64 [b, l], ``steps`` + 1 where there is none (any more).
            steps: Number of steps.

        Returns:
            ``left`` afterwards, whose least value :attr:`Walk.told` has, and whether there were masks to remove.
        """
        never, now = steps + 1, left.amin(1)
        chosen = (left == now[:, None]) & (left < never)
        after = left.masked_fill(chosen, never)
        t = self._times(walk, steps)[now.clamp(max=steps)]
        return after, walk.reveal(chosen, t, ahead=after.amin if walk.watched else None)

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        ancestral(walk, t, s)


class PredictorCorrector(StepSampler, kind="sampler"):
    """Predictor-corrector sampler: analytic steps, each followed by Gibbs sampling (arXiv 2205.14987, section 4.4).

    A correction draws ``sites`` random positions anew, one after another, each from p_t(x_i | all other positions),
    which is proportional to the scores at the noise level that the step has reached. The distribution p_t of noisy rows
    is invariant, so corrections reduce the error of the steps.
    """

    reads = ("log_score", "log_x0")

    class Config(PositionsConfig):
        corrections: Annotated[int, pydantic.Field(ge=1, le=1000)] = 1
        """Number of corrections after each step, from 1 to 1,000."""
        sites: Annotated[int, pydantic.Field(ge=1)] = 1
        """Number of different positions that one correction draws anew, at least 1. Each takes a network evaluation,
        since positions that are drawn together would be drawn independently, and p_t would not be invariant."""

    config: Config

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        analytic(walk, t, s)
        if s is not None:
            for _ in range(self.config.corrections):
                self._correct(walk, s)

    def _correct(self, walk: Walk, t: Tensor) -> None:
        keys = walk.uniform(*walk.x.shape).masked_fill(~walk.free, 2.0)
        rank = keys.argsort(-1).argsort(-1)
        for site in range(min(self.config.sites, walk.x.shape[1])):
            chosen = (rank == site) & walk.free
            if walk.kernel.mask is not None:
                # scores are known at masks alone: mask the position, then draw whether it is unmasked, and to which token
                walk.remask(chosen.double())
            sigma = walk.schedule.sigma(t)

            def law(
                found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor, sigma: Tensor = sigma
            ) -> Tensor:
                score = walk.score_of(found, x, sigma[row])
                return score / score.sum(-1, keepdim=True)

            walk.advance(walk.outputs(t), law, only=chosen)


class Psi(StepSampler, kind="sampler"):
    """Psi-sampler: ancestral steps in which some tokens are denoised and noised again (arXiv 2602.21185).

    In each step a position takes the ancestral step with probability ``kappa``. Otherwise a clean token is drawn for
    the position and noised to the new noise level, which is remasking under a masking kernel. Every step preserves the
    marginal distributions of the forward process.

    Clean tokens that are drawn in one step are drawn independently. With ``kappa`` below 1, the number drawn in a step
    near the end does not fall in proportion to 1 / steps, so the error falls slowly: on a toy of 3 positions and 3
    tokens, where the distribution of samples can be computed exactly, total variation falls as steps^-0.4, and with the
    ancestral sampler as steps^-1 (benchmarks/sampler_order.py).
    """

    reads = ("log_x0",)

    class Config(PositionsConfig):
        kappa: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.95
        """Probability that a position takes the ancestral step, from 0 to 1. 1: the ancestral sampler."""

    config: Config

    @property
    def order(self) -> float:
        return 1.0 if self.config.kappa == 1 else 0.4  # measured: benchmarks/sampler_order.py

    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        anew = walk.uniform(*walk.x.shape) > self.config.kappa
        if s is None or self.config.kappa == 1:
            ancestral(walk, t, s)
            return
        sigma, below = walk.schedule.sigma(t), walk.schedule.sigma(s)
        step, clean = posterior(walk, sigma, below), posterior(walk, sigma, torch.zeros_like(sigma))

        def law(found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor) -> Tensor:
            return torch.where(
                anew[row[:, None], place][..., None], clean(found, x, row, place), step(found, x, row, place)
            )

        # the two sets of positions are disjoint, and both move from the rows before the step
        chance, weights = walk.chances(walk.outputs(t), law)
        final = torch.where(walk.masked, 1.0, chance)
        changes = [(chance * ~anew, weights, False), (final * anew, weights, True)]
        if walk.draw_each(changes, when=anew.any()):
            walk.noise(anew, below)
