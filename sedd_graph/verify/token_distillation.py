"""The enumerated case of distillation on token rows (:mod:`sedd_graph.verify.distillation`).

Axes: b rows, l positions, n states.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sedd_graph.component.check import Check
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.distillation import Distillable, Outputs, Pair
from sedd_graph.verify.distillation import DistillationCase, compared
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

    divergence = float((other.law * (other.law / toy.law).log()).sum())
    return DistillationCase(
        process,
        toy.parts.schedule.time,
        lambda count, generator: rows(toy, count, generator),
        lambda draw, batch: outputs(toy, draw, batch),
        code,
        lambda batch, pair: _pairs(toy, batch, pair),
        (lambda count, generator: rows(other, count, generator), lambda d, b: outputs(other, d, b), divergence),
    )


def _pairs(toy: Toy, batch: Batch, pair: Pair) -> Check:
    """Compare x_s and x_t given x_0, position by position, with the kernel's transition matrices."""
    kernel, n, v = toy.parts.kernel, toy.states, toy.tokens
    below, sigma = (float(x.sigma.flatten()[0]) for x in (pair.lower, pair.upper))
    chance = kernel.transition_matrix(below)[:, :v].T[:, :, None] * kernel.transition_matrix(sigma, below).T[None]
    x0, xs, xt = (x.flatten() for x in (batch.tokens, pair.lower.xt, pair.upper.xt))
    counts = torch.bincount((x0 * n + xs) * n + xt, minlength=v * n * n).view(v, n, n).double()
    return compared(counts, chance, f"{x0.numel():,} positions")
