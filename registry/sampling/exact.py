"""Samplers without an error of their own: first-hitting and uniformization. The rows decide how often the network is asked.

Axes: b batch, l length, n states.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sedd_graph.diffusion.numerics import log1mexp, log_expm1
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.sampler import Sampler
from sedd_graph.diffusion.tokens.walk import ROUNDING, T_MIN, SamplerConfig, Walk
from sedd_graph.errors import UserError


def one_of(walk: Walk, places: Tensor, rows: Tensor) -> Tensor:
    """bool [b, l]: one of the ``places`` bool [b, l] of each of ``rows`` bool [b], each as likely."""
    keys = walk.uniform(*places.shape).masked_fill(~places, 2.0)
    return torch.zeros_like(places).scatter(1, keys.argmin(1, keepdim=True), True) & places & rows[:, None]


def next_hit(log_hit: Tensor, left: Tensor, u: Tensor) -> Tensor:
    """log of the share of tokens that are masked when the next of ``left`` masks falls, down from ``log_hit``."""
    return log_hit + u.log() / left.clamp(min=1)


class FirstHitting(Sampler, kind="sampler"):
    """The times at which masks fall, drawn exactly, and one token at each: the law of infinitely many steps (arXiv 2409.02908).

    With n masks left and a share 1 - alpha of tokens masked, the next falls at (1 - alpha) u^(1/n), u uniform, at a random
    place. The network is asked once per free token.
    """

    reads = ("log_x0", "log_score")
    needs_mask = True
    exact = True

    class Config(SamplerConfig):
        pass

    def walk(self, walk: Walk, steps: int) -> None:
        rows = walk.x.shape[0]
        start = walk.schedule.sigma(torch.ones(rows, device=walk.x.device, dtype=torch.float64))
        log_hit = log1mexp(start)
        while bool((masked := walk.masked).any()):
            left = masked.sum(1)
            log_hit = next_hit(log_hit, left, walk.uniform(rows))
            # never quite 1 - alpha = 1 or 0, where there is no time
            sigma = -torch.log1p(-log_hit.clamp(min=-300, max=-1e-12).exp())
            walk.reveal(one_of(walk, masked, left > 0), walk.time(sigma))
            walk.shown()


class Uniformization(Sampler, kind="sampler"):
    """Candidate moves from a Poisson process that is at least as fast as the reverse process, each taken with its share of the rate (arXiv 2402.08095).

    On the clock log(exp(sigma) - 1) no position is ever left faster than the kernel's ``rate_bound`` (1 where tokens are hit at rate
    1 by draws that never change), so candidates come evenly, at random places: about sigma(1) + log(1/sigma(0)) evaluations
    per free token at a bound of 1. Scores that break the bound are counted as clamped.
    """

    reads = ("log_score", "log_x0")
    exact = True

    class Config(SamplerConfig):
        pass

    def lacks(self, kernel: Kernel) -> str | None:
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
            walk.shown()
        last = torch.full((rows,), T_MIN, device=walk.x.device)
        left = walk.schedule.sigma(last)
        walk.move(walk.kernel.analytic(walk.score(last, left), walk.x, left, torch.zeros_like(left)), final=True)
        walk.shown()
