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
from sedd_graph.verify.distillation import DEVIATIONS, DistillationCase
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
        """Number noisy rows; in block diffusion with their clean rows, on which later blocks depend."""
        found = toy.code(draw.xt, toy.states)
        return found if toy.block == toy.length else found * toy.states**toy.length + toy.code(batch.tokens, toy.states)

    divergence = float((other.law * (other.law / toy.law).log()).sum())
    return DistillationCase(
        process,
        lambda count, generator: rows(toy, count, generator),
        lambda draw, batch: outputs(toy, draw, batch),
        code,
        lambda batch, pair, s, t: _pairs(toy, batch, pair),
        (lambda count, generator: rows(other, count, generator), lambda d, b: outputs(other, d, b), divergence),
    )


def _pairs(toy: Toy, batch: Batch, pair: Pair) -> Check:
    """Compare x_s and x_t given x_0, position by position, with the kernel's transition matrices."""
    kernel, n, v = toy.parts.kernel, toy.states, toy.tokens
    below, sigma = (float(x.sigma.flatten()[0]) for x in (pair.lower, pair.upper))
    chance = kernel.transition_matrix(below)[:, :v].T[:, :, None] * kernel.transition_matrix(sigma, below).T[None]
    x0, xs, xt = (x.flatten() for x in (batch.tokens, pair.lower.xt, pair.upper.xt))
    counts = torch.bincount((x0 * n + xs) * n + xt, minlength=v * n * n).view(v, n, n).double()
    rows = counts.sum((1, 2), keepdim=True)
    expected = rows * chance.clamp(min=0)
    # Poisson deviations; a pair that cannot be is wrong once it is drawn
    off = (counts - expected).abs() / (expected * (1 - chance.clamp(0, 1))).clamp(min=1e-6).sqrt()
    off = torch.where(expected > 5, off, torch.where(counts > expected + 25, 99.0, 0.0))
    impossible = int(counts[chance <= 1e-12].sum())
    worst = float(off.max())
    return Check(
        "distill.pairs",
        "x_0, x_s and x_t are drawn as a Markov chain of the kernel",
        worst < DEVIATIONS and impossible == 0,
        f"at most {worst:.1f} standard errors; {impossible} impossible pairs",
        f"{x0.numel():,} positions",
    )
