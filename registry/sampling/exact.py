"""Samplers without time discretisation error: ``first_hitting`` and ``uniformization``.

Both draw the event times of the reverse process instead of a grid of times. Axes: b batch, l length, n states.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sedd_graph.diffusion.numerics import log1mexp, log_expm1
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.sampler import Sampler, Stepwise
from sedd_graph.diffusion.tokens.stage import Rows
from sedd_graph.diffusion.tokens.walk import ROUNDING, T_MIN, Walk
from sedd_graph.errors import UserError

from .steps import analytic


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


class FirstHitting(Stepwise, Sampler, kind="sampler"):
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
        kept = self.begin(walk, steps)
        # every row with masks unmasks one at a time
        for number in range(int(walk.transfer(walk.masked.sum(1).amax())[0])):
            kept = self.advance(walk, kept, number, steps)

    def begin(self, walk: Walk, steps: int) -> tuple[Tensor, ...]:
        start = walk.schedule.sigma(torch.ones(len(walk.x), device=walk.x.device, dtype=torch.float64))
        return (log1mexp(start),)

    def advance(self, walk: Walk, kept: tuple[Tensor, ...], number: int, steps: int) -> tuple[Tensor, ...]:
        masked = walk.masked
        left = masked.sum(1)
        log_hit = next_hit(kept[0], left, walk.uniform(len(left)))
        # shares 0 and 1 have no finite time
        sigma = -torch.log1p(-log_hit.clamp(min=-300, max=-1e-12).exp())
        walk.reveal(one_of(walk, masked, left > 0), walk.time(sigma))
        walk.end_step()
        return (log_hit,)


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
        ends = walk.schedule.sigma(torch.tensor([1.0, T_MIN], device=walk.x.device, dtype=torch.float64))
        clock, end = (v.expand(rows) for v in log_expm1(ends))
        places = walk.free.sum(1)

        def tick(clock: Tensor) -> tuple[Tensor, Tensor]:
            """Return the time of the next candidate of each row, and the rows of which it is before the end, [b] each."""
            clock = clock + walk.uniform(rows).log() / (bound * places.clamp(min=1))
            return clock, (clock > end) & (places > 0)

        clock, alive = tick(clock)
        count = int(walk.transfer(alive.sum())[0])
        while count:
            sigma = torch.where(alive, softplus(clock, threshold=40.0), 1.0)
            outputs = walk.outputs(walk.time(sigma), Rows(alive, count))

            def law(
                found: Mapping[str, Tensor], x: Tensor, row: Tensor, place: Tensor, sigma: Tensor = sigma
            ) -> tuple[tuple[Tensor], Tensor]:
                score = walk.score_of(found, x, sigma[row].float())
                moves = walk.kernel.reverse_rate(score, x, sigma[row].to(score.dtype))
                return (moves.sum(-1),), moves

            chosen = one_of(walk, walk.free, alive)
            (total,), weights = walk.scan(outputs, law, only=chosen)
            chance = total.double() * -torch.expm1(-sigma)[:, None] / bound
            walk.count_clamped(chosen & (chance > 1 + ROUNDING))
            following: list[Tensor] = []

            def ahead(clock: Tensor = clock, following: list[Tensor] = following) -> Tensor:
                following.extend(tick(clock))
                return following[1].sum()

            walk.put(walk.draw(torch.where(chosen, chance, 0.0), weights, ahead=ahead))
            walk.end_step()
            (clock, alive), count = following, int(walk.told[0])
        last = torch.full((rows,), T_MIN, device=walk.x.device)
        analytic(walk, last, None)
        walk.end_step()
