"""The enumerated case of distillation on token rows (:mod:`sedd_graph.verify.distillation_case`).

Axes: b rows, l positions, n states.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.distillation import Distillable, Evaluate, Outputs, Pair
from sedd_graph.diffusion.tokens.objective import lower_posterior
from sedd_graph.verify.distillation_case import DistillationCase, compared
from sedd_graph.verify.toy import PAIR, TRIPLE, Toy

__all__ = ["token_case"]

OTHER_SEED = 11
"""Seed of the second distribution of the same rows."""


def token_case(toy: Toy, process: Distillable, output: str) -> DistillationCase:
    """Return the case of a process on token rows.

    Args:
        toy: Data set with a known distribution, and a perfect network for it.
        process: What the process gives to distillation objectives, with the components of the toy.
        output: Kind of network output, ``log_score`` or ``log_x0``.
    """
    other = Toy(
        toy.parts,
        dataclasses.replace(
            TRIPLE if toy.block == toy.length else PAIR, seed=OTHER_SEED, spread=0.7, tokens=toy.tokens
        ),
    )

    def rows(of: Toy, count: int, generator: torch.Generator) -> Batch:
        return Batch.of(of.sequences[torch.multinomial(of.law, count, replacement=True, generator=generator)])

    def outputs(of: Toy, draw: Draw, batch: Batch) -> Outputs:
        kernel = of.parts.kernel
        found = of.outputs_for(draw, batch, output)
        if draw.sigma.dim() > 1:
            return found  # outputs of blocks: kernels of blocks read them as they are
        return kernel.express(found, draw.xt, draw.sigma)

    def code(draw: Draw, batch: Batch) -> Tensor:
        """Number the noisy rows; in block diffusion each noisy block, with the clean blocks before it."""
        starts = range(0, toy.length, toy.block)
        inputs = [torch.cat([batch.tokens[:, :k], draw.xt[:, k : k + toy.block]], 1) for k in starts]
        return torch.stack([toy.code(x, toy.states) for x in inputs], 1)

    def students(t: float) -> TokenStudents:
        return TokenStudents(toy, output, t, lambda of: lambda draw, batch: outputs(of, draw, batch))

    divergence = float((other.law * (other.law / toy.law).log()).sum())
    return DistillationCase(
        process,
        toy.parts.schedule.time,
        lambda count, generator: rows(toy, count, generator),
        lambda draw, batch: outputs(toy, draw, batch),
        code,
        lambda batch, pair: _pairs(toy, batch, pair),
        (lambda count, generator: rows(other, count, generator), lambda d, b: outputs(other, d, b), divergence),
        students if toy.block == toy.length else None,
    )


class TokenStudents:
    """Students that reconstruct all positions of a noisy row of the data at once, each by itself.

    Args:
        toy: Data set with a known distribution.
        output: Kind of network output, ``log_score`` or ``log_x0``.
        t: Time of the noisy rows.
        network: Returns the perfect network of a data set.
    """

    def __init__(self, toy: Toy, output: str, t: float, network: Callable[[Toy], Evaluate]) -> None:
        self._toy, self._network = toy, network
        x = torch.tensor(list(itertools.product(range(toy.states), repeat=toy.length)))
        sigma = toy.parts.schedule.sigma(torch.full((len(x),), t)).detach()
        self._draw = Draw(x, torch.full_like(sigma, t), sigma, torch.ones_like(sigma), torch.ones_like(sigma))
        likely = toy.likelihood(x, sigma)
        self._chance = self._rows(likely) @ toy.law
        self.perfect = toy.parts.kernel.express(toy.outputs(x, sigma, output), x, sigma)

    def _rows(self, each: Tensor) -> Tensor:
        """Return the products of the values of a row's tokens, [u, s], from those of each token [u, l, v]."""
        found = torch.ones(len(each), len(self._toy.sequences), dtype=torch.float64)
        for i, tokens in enumerate(self._toy.sequences.T):
            found = found * each[:, i, tokens]
        return found

    def divergence(self, outputs: Outputs) -> tuple[Tensor, Evaluate]:
        kernel, draw = self._toy.parts.kernel, self._draw
        found = kernel.translate(outputs, draw.xt, draw.sigma)
        each = lower_posterior(found, draw, kernel, torch.zeros_like(draw.sigma)).double()[..., : self._toy.tokens]
        law = self._chance @ self._rows(each / each.sum(-1, keepdim=True))
        own = self._network(self._toy.distributed(law.detach()))
        return torch.xlogy(law, law / self._toy.law).sum(), own


def _pairs(toy: Toy, batch: Batch, pair: Pair) -> Check:
    """Compare x_s and x_t given x_0, position by position, with the kernel's transition matrices."""
    kernel, n, v = toy.parts.kernel, toy.states, toy.tokens
    below, sigma = (float(x.sigma.flatten()[0]) for x in (pair.lower, pair.upper))
    chance = kernel.transition_matrix(below)[:, :v].T[:, :, None] * kernel.transition_matrix(sigma, below).T[None]
    x0, xs, xt = (x.flatten() for x in (batch.tokens, pair.lower.xt, pair.upper.xt))
    counts = torch.bincount((x0 * n + xs) * n + xt, minlength=v * n * n).view(v, n, n).double()
    return compared(counts, chance, f"{x0.numel():,} positions")
