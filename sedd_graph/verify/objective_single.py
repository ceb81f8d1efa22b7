"""Comparison of the loss of single draws of an objective, and of its gradient, with the kernel's own loss.

Axes: b rows, l positions, n states, v data tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.verify.objective_terms import (
    copies_of,
    even_outputs,
    expected_loss,
    parted,
    predicted,
    random_outputs,
    with_tokens,
)
from sedd_graph.verify.toy import Toy

__all__ = ["POINTWISE", "compare", "fit_rest", "given_draw", "rest_of"]

POINTWISE = 5e-4
"""Tolerance of the loss of one draw and of its gradient, relative; float32 rounding gives up to 3e-4, in scores of uniform noise."""
RARE = 1e-5
"""Least probability of a noisy token for its loss to be compared as often as that of frequent ones."""
FLOOR = 0.02
"""Share of the loss of an even prediction that rounding is compared with, where the loss itself is less."""
SMALL = 2e-3
"""Share of the factor of the loss of one position that rounding is compared with, where the loss itself is less."""


def given_draw(toy: Toy, objective: Objective, batch: Batch, t: Tensor, generator: torch.Generator) -> Draw:
    """Draw noisy rows at given times without the objective, and pass them to :meth:`Objective.corrupt`.

    In every second row all noisy tokens of a probability above 1e-5 are equally likely, so that the losses of rare ones
    are compared too. For the measure ``masked``, tokens are instead masked at a random rate for each row.

    Args:
        toy: Data set with a known distribution, its kernel and its schedule.
        objective: The objective.
        batch: Clean rows, b of them.
        t: Times, float32 [b].
        generator: Random number generator.

    Returns:
        The draw that the objective makes of these times and noisy rows.
    """
    kernel, schedule, x0, n = toy.parts.kernel, toy.parts.schedule, batch.tokens, toy.states
    random = Randomness(generator)
    if objective.measure == "masked":
        hidden = torch.rand(x0.shape, generator=generator) < torch.rand(len(x0), 1, generator=generator)
        hidden[:, :: toy.block] |= ~parted(hidden, toy.block).any(1).view(len(x0), -1)
        xt = torch.where(hidden & batch.corrupt, kernel.require_mask(), x0)
    else:
        sigma = objective.corrupt(batch, kernel, schedule, random=random, t=t, xt=x0).sigma
        p = toy.transition(sigma.reshape(-1)).transpose(1, 2)
        law = p[torch.arange(len(p))[:, None], parted(x0, toy.block)].clamp(min=0)
        # every second row has rare noisy tokens as often as frequent ones
        law = torch.where(torch.arange(len(p))[:, None, None] % 2 == 1, (law > RARE).double(), law)
        drawn = torch.multinomial(law.reshape(-1, n), 1, generator=generator)[:, 0].view(x0.shape)
        xt = torch.where(batch.corrupt, drawn, x0)
    return objective.corrupt(batch, kernel, schedule, random=random, t=t, xt=xt)


def compare(
    toy: Toy, objective: Objective, draw: Draw, batch: Batch, output: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the loss of an objective, row by row, and its gradient, with the expected ones at random network outputs.

    Args:
        toy: Data set with a known distribution, its kernel and its schedule.
        objective: The objective.
        draw: The noisy rows, c for each clean row, c * b in all.
        batch: The clean rows, b of them.
        output: Kind of network output, ``log_score`` or ``log_x0``.
        generator: Random number generator of the outputs.

    Returns:
        The loss minus :func:`expected_loss`, nats, float64 [b]; the size of the loss by which to divide this difference
        for a relative error, float64 [b]; and the relative error of the gradient, float64 [c b].
    """
    kernel, schedule, copies = toy.parts.kernel, toy.parts.schedule, copies_of(draw, batch)
    whole = with_tokens(batch, draw)
    raw = random_outputs(toy, objective, draw, output, generator)
    even = even_outputs(toy, objective, draw, output)
    with torch.enable_grad():
        mine = raw.clone().requires_grad_()
        loss = objective.loss(predicted(toy, objective, mine, draw, output), draw, batch, kernel, schedule)
        found = torch.autograd.grad(loss.sum(), mine, allow_unused=True)[0] if loss.requires_grad else None
    expected, true, factor = _expected(toy, objective, raw, draw, whole, output)
    usual, steep, _ = _expected(toy, objective, even, draw, whole, output)
    # rounding is relative to the loss of an even prediction, and to the factor of the loss of one position, at least
    found = torch.zeros_like(true) if found is None else found.double() * copies
    norm, least = (v.abs().flatten(1).amax(1) for v in (true, steep))
    gradient = (found - true).abs().flatten(1).amax(1) / (norm + FLOOR * least + SMALL * factor + 1e-9)
    usual = usual.abs()
    for shift in range(1, toy.tokens if objective.measure == "time" else 1):  # a token of the row may be nearly certain
        other = dataclasses.replace(whole, tokens=(whole.tokens + shift) % toy.tokens)
        nats, _ = expected_loss(toy, objective, predicted(toy, objective, even.double(), draw, output), draw, other)
        usual = torch.maximum(usual, nats.abs().nan_to_num(nan=0.0, posinf=0.0))
    scale = (expected.abs() + FLOOR * usual + SMALL * factor + 1e-5).view(copies, -1).mean(0)
    return loss.detach().double() - expected.view(copies, -1).mean(0), scale, gradient


def _expected(
    toy: Toy, objective: Objective, raw: Tensor, draw: Draw, batch: Batch, output: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the expected loss of each draw at raw outputs [b, l, n], [b], its gradient, and its factor, [b]."""
    with torch.enable_grad():
        own = raw.double().requires_grad_()
        expected, factor = expected_loss(toy, objective, predicted(toy, objective, own, draw, output), draw, batch)
        true = torch.autograd.grad(expected.sum(), own, allow_unused=True)[0]
    return expected.detach(), torch.zeros_like(own) if true is None else true, factor


def fit_rest(batch: Batch, off: Tensor, scale: Tensor, tokens: int) -> Tensor:
    """Estimate the constants that an objective adds to its loss, one for each token of the vocabulary, by least squares.

    An objective may add a cost for each clean token that depends on this token alone, not on noise or network
    (:attr:`Objective.measure`).

    Args:
        batch: Clean rows, b of them.
        off: The objective's loss minus the expected one, nats, float64 [b].
        scale: Size of the loss, by which each row is divided, float64 [b].
        tokens: Number of data tokens v.

    Returns:
        Cost of each data token, nats, float64 [v].
    """
    counts = (F.one_hot(batch.tokens, tokens) * (batch.loss & batch.corrupt)[..., None]).sum(1).double()
    a, y = counts / scale[:, None], off / scale
    found, *_ = np.linalg.lstsq(a.numpy(), y.numpy(), rcond=1e-10)
    return torch.from_numpy(found)


def rest_of(batch: Batch, cost: Tensor) -> Tensor:
    """Return the sum of ``cost`` [v], nats per clean token, over the positions of each row that count, float64 [b].

    These are the positions where ``batch.loss`` and ``batch.corrupt`` are both true.
    """
    return torch.where(batch.loss & batch.corrupt, cost[batch.tokens], 0.0).sum(1)
