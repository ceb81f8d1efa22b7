"""Samplers without time discretisation error: ``first_hitting`` and ``uniformization``.

Both draw the event times of the reverse process instead of a grid of times. Axes: b batch, l length, n states.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sedd_graph.diffusion.numerics import log1mexp, log_expm1
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.tweedie import needs_float64, tweedie
from sedd_graph.diffusion.tokens.walk import ROUNDING, T_MIN, Walk
from sedd_graph.errors import UserError


def one_of(walk: Walk, places: Tensor, rows: Tensor) -> Tensor:
    """Choose one position per row, uniformly at random.

    Args:
        walk: State of the sampling run, the source of random numbers.
        places: Candidate positions, bool [b, l].
        rows: Rows in which a position is chosen, bool [b].

    Returns:
        bool [b, l], True at the chosen positions; all False in a row that is not in ``rows`` or has no candidate.
    """
    keys = walk.uniform(*places.shape).masked_fill(~places, 2.0)
    return torch.zeros_like(places).scatter(1, keys.argmin(1, keepdim=True), True) & places & rows[:, None]


def next_hit(log_hit: Tensor, left: Tensor, u: Tensor) -> Tensor:
    """Return the noise level at which the next mask of each row is removed, as log(1 - alpha).

    Here alpha = exp(-sigma), so 1 - alpha is the probability that a token is masked. At the next event it is u^(1/left)
    times its current value.

    Args:
        log_hit: log(1 - alpha) at the current noise level, [b].
        left: Number of masks in the row, [b].
        u: Uniform random numbers in (0, 1], [b].

    Returns:
        log(1 - alpha) at the next event, [b].
    """
    return log_hit + u.log() / left.clamp(min=1)


class FirstHitting(Sampler, kind="sampler"):
    """First-hitting sampler: unmasks one token at a time, at exact random event times (arXiv 2409.02908).

    It has the distribution of ancestral sampling in the limit of infinitely many steps. With n masks left in a row at
    masking probability 1 - alpha, where alpha = exp(-sigma), the next mask is removed at masking probability (1 -
    alpha) u^(1/n), with u uniform in (0, 1], at a random position. The network is evaluated once per generated token.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True
    exact = True
    takes_all = True

    def walk(self, walk: Walk, steps: int) -> None:
        rows = walk.x.shape[0]
        start = walk.schedule.sigma(torch.ones(rows, device=walk.x.device, dtype=torch.float64))
        log_hit = log1mexp(start)
        while bool((masked := walk.masked).any()):
            left = masked.sum(1)
            log_hit = next_hit(log_hit, left, walk.uniform(rows))
            # shares 0 and 1 have no finite time
            sigma = -torch.log1p(-log_hit.clamp(min=-300, max=-1e-12).exp())
            walk.reveal(one_of(walk, masked, left > 0), walk.time(sigma))
            walk.end_step()


class Uniformization(Sampler, kind="sampler"):
    """Uniformization: simulates the reverse process exactly, by rejection of candidate transitions (arXiv 2402.08095).

    In the time variable log(exp(sigma) - 1), the total reverse rate at a position is at most the kernel's
    ``rate_bound``. Candidates are drawn at this rate at every position, and each is accepted with probability reverse
    rate / ``rate_bound``. The simulation ends at time t = 1e-5, from where an analytic step leads to clean text.

    Each candidate takes one network evaluation. The number of candidates per generated token is about ``rate_bound`` *
    (sigma(1) - log sigma(1e-5)), such as 18 with the schedule ``loglinear`` and a ``rate_bound`` of 1. Reverse rates
    above the bound are counted in ``clamped``.
    """

    reads = ("log_score", "log_x0")
    exact = True
    takes_all = True

    def lacks(self, kernel: Kernel) -> str | None:
        if (lack := super().lacks(kernel)) is not None:
            return lack
        return "a kernel whose reverse rates have a known bound" if kernel.rate_bound is None else None

    def walk(self, walk: Walk, steps: int) -> None:
        rows, bound = walk.x.shape[0], walk.kernel.rate_bound
        if bound is None:
            raise UserError(f"uniformization needs {self.lacks(walk.kernel)}")
        ends = torch.tensor([1.0, T_MIN], device=walk.x.device, dtype=torch.float64)
        clock, end = (v.expand(rows) for v in log_expm1(walk.schedule.sigma(ends)))
        places = walk.free.sum(1)
        while True:
            clock = clock + walk.uniform(rows).log() / (bound * places.clamp(min=1))
            alive = (clock > end) & (places > 0)
            if not bool(alive.any()):
                break
            sigma = torch.where(alive, softplus(clock, threshold=40.0), 1.0)
            score = walk.score(walk.time(sigma), sigma, need=alive)
            moves = walk.kernel.reverse_rate(score, walk.x, sigma.to(score.dtype))
            chance = moves.sum(-1).double() * -torch.expm1(-sigma)[:, None] / bound
            chosen = one_of(walk, walk.free, alive)
            walk.clamped += int((chosen & (chance > 1 + ROUNDING)).sum())
            walk.put(walk.draw(torch.where(chosen, chance, 0.0), moves))
            walk.end_step()
        last = torch.full((rows,), T_MIN, device=walk.x.device)
        left = walk.schedule.sigma(last)
        end = torch.zeros_like(left)
        score = walk.score(last, left, precise=needs_float64(walk.kernel, left, end))
        walk.check_outputs()
        walk.move(tweedie(walk.kernel, score, walk.x, left, end), final=True)
        walk.end_step()
