"""Enumeration of an objective over all pairs of a clean and a noisy row: its value, its optimum, and single draws.

Axes: b rows, l positions, n states, v data tokens, e pairs of a clean and a noisy row, u distinct inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.verify.kernel_draws import SETTLED
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

__all__ = [
    "Value",
    "compare",
    "decoded",
    "fit_rest",
    "given_draw",
    "pairs",
    "prior_cost",
    "rest_of",
    "value_of",
]

POINTWISE = 5e-4
"""Tolerance of the loss of one draw and of its gradient, relative; float32 rounding gives up to 3e-4, in scores of uniform noise."""
RARE = 1e-5
"""Least probability of a noisy token for its loss to be compared as often as that of frequent ones."""
FLOOR = 0.02
"""Share of the loss of an even prediction that rounding is compared with, where the loss itself is less."""
SMALL = 2e-3
"""Share of the factor of the loss of one position that rounding is compared with, where the loss itself is less."""
BREAKS = (0.0, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99, 0.999, 1.0)
"""Ends of the intervals of the quadrature over time, as shares of the interval from the least time to 1."""
ROWS_AT_ONCE = 60_000
"""Number of pairs that are evaluated in one call."""
MOST_ROWS = 30_000
"""Number of pairs per quadrature node that are enumerated for a process in discrete time."""


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


def pairs(toy: Toy, objective: Objective, t: Tensor) -> tuple[Draw, Batch, Tensor, Tensor]:
    """Return all pairs of a clean row and a possible noisy row at each time, and their probabilities.

    For the measure ``masked``, the number of masks of each block is uniform, and ``t`` is not used.

    Args:
        toy: The toy.
        objective: The objective.
        t: Times, float64 [q].

    Returns:
        The noisy rows and the clean rows, e rows; their probabilities, float64 [e], with sum 1 for each time; and the
        index of the time of each, int64 [e].
    """
    kernel, schedule, n, length = toy.parts.kernel, toy.parts.schedule, toy.states, toy.length
    patterns = torch.tensor(list(itertools.product(range(n), repeat=length)))
    random, first = Randomness(torch.Generator()), Batch.of(toy.sequences[:1].expand(len(t), -1))
    if objective.measure == "masked":
        mask = kernel.require_mask()
        hidden = patterns == mask
        same = (hidden[None] | (patterns[None] == toy.sequences[:, None])).all(-1)
        ways = torch.ones(len(patterns), dtype=torch.float64)
        for k in hidden.view(len(patterns), -1, toy.block).sum(-1).T:
            each = [1 / (toy.block * math.comb(toy.block, c)) if c else 0.0 for c in range(toy.block + 1)]
            ways = ways * torch.tensor(each, dtype=torch.float64)[k]
        chance = (same * ways).expand(len(t), -1, -1)
    else:
        sigma = objective.corrupt(first, kernel, schedule, random=random, t=t.float(), xt=first.tokens).sigma
        p = toy.transition(sigma.reshape(len(t), -1)[:, 0])
        chance = torch.ones(len(t), len(toy.sequences), len(patterns), dtype=torch.float64)
        for i in range(length):
            chance = chance * p[:, patterns[:, i]][:, :, toy.sequences[:, i]].transpose(1, 2)
    chance = chance * toy.law[:, None]
    at, x0, xt = (chance > 1e-13).nonzero().T
    batch = Batch.of(toy.sequences[x0])
    draw = objective.corrupt(batch, kernel, schedule, random=random, t=t.float()[at], xt=patterns[xt])
    return draw, batch, chance[at, x0, xt], at


def decoded(toy: Toy, draw: Draw, batch: Batch) -> Tensor:
    """Return the sum over positions of -log p(clean token | noisy row), from the distribution of the data, float64 [e].

    In block diffusion the noisy row is that of the block, and the clean blocks before it are given.

    Args:
        toy: The toy.
        draw: Noisy rows, e of them.
        batch: The clean row of each.
    """
    sigma, clean = draw.sigma.reshape(len(draw.xt), -1), F.one_hot(batch.tokens, toy.tokens).double()
    total = torch.zeros(len(draw.xt), dtype=torch.float64)
    for k, start in enumerate(range(0, toy.length, toy.block)):
        here = slice(start, start + toy.block)
        seen = toy.likelihood(draw.xt[:, here], sigma[:, k]).double()
        like = torch.cat([clean[:, :start], seen, torch.ones_like(clean[:, here.stop :])], 1)
        law = toy.others(like)[:, here] * seen
        law = law / law.sum(-1, keepdim=True).clamp(min=1e-300)
        total -= (law * clean[:, here]).sum(-1).clamp(min=1e-300).log().sum(-1)
    return total


@dataclasses.dataclass(frozen=True)
class Value:
    """Value of a bound on -log p(x_0) with a perfect network, by enumeration.

    Attributes:
        nats: The value, nats per sequence, without the constant cost per token that an objective may add.
        expected: The correct value, nats per sequence.
        error: Estimated error of the quadrature, or a tolerance for rounding, nats.
        how: The method as a text, such as the number of quadrature nodes.
    """

    nats: float
    expected: float
    error: float
    how: str


def value_of(toy: Toy, objective: Objective, output: str, low: float, cost: Tensor, nodes: int) -> Value:
    """Compute the bound of a perfect network as a sum over all clean and noisy rows, and the value that it must have.

    Args:
        toy: Data set with a known distribution, and a perfect network for it.
        objective: The objective.
        output: Kind of network output, ``log_score`` or ``log_x0``.
        low: Lower end of the integral over time, for an objective that has one (the upper end is 1).
        cost: Constant that the objective adds for each clean token, nats, float64 [v]; it is subtracted.
        nodes: Quadrature nodes per interval of time.

    Returns:
        The value of the bound, the correct value, and the error of the former.
    """

    def means(t: Tensor) -> Tensor:
        """Return the mean loss at each time, and that by the kernel's own loss if there are steps, [q, 2]."""
        found = []
        for part in t.split(max(1, ROWS_AT_ONCE // (len(toy.sequences) * toy.states**toy.length))):
            draw, batch, chance, at = pairs(toy, objective, part)
            if objective.measure == "time":
                draw = dataclasses.replace(draw, weight=torch.ones_like(draw.weight))
            outputs = toy.outputs_for(draw, batch, output)
            loss = objective.loss(outputs, draw, batch, toy.parts.kernel, toy.parts.schedule).double()
            both = [loss - rest_of(batch, cost)]
            if objective.measure == "steps":
                both.append(expected_loss(toy, objective, outputs, draw, batch)[0])
            rows = torch.stack([v * chance for v in both], 1)
            found.append(torch.zeros(len(part), len(both), dtype=torch.float64).index_add(0, at, rows))
        return torch.cat(found)

    if objective.measure == "masked":
        nats = float(means(torch.full((1,), 0.5, dtype=torch.float64)))
        return Value(nats, toy.entropy, 1e-4, "all numbers of masks")
    if objective.measure == "steps":
        count = steps_of(toy, objective)
        most = max(2, min(count, MOST_ROWS * nodes // len(toy.sequences) // toy.states**toy.length))
        some = torch.linspace(1, count, most, dtype=torch.float64).round().unique()
        found = means(some / count).mean(0)
        return Value(float(found[0]), float(found[1]), 1e-4, f"{len(some):,} of {count:,} steps")
    totals, ends = [], low + (1 - low) * torch.tensor(BREAKS, dtype=torch.float64)
    for rule in (nodes, nodes - 2):
        x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(rule))
        width = ends.diff()[:, None]
        t = ends[:-1, None] + width * (1 + x) / 2
        totals.append(float((means(t.reshape(-1))[:, 0] * (width * w / 2).reshape(-1)).sum()))
    sigmas = toy.parts.schedule.sigma(torch.tensor([max(low, 1e-9), 1.0], dtype=torch.float64))
    expected = toy.entropy_given(float(sigmas[1])) - toy.entropy_given(float(sigmas[0]))
    how = f"quadrature over time with {nodes * (len(BREAKS) - 1)} nodes"
    return Value(totals[0], expected, abs(totals[0] - totals[1]), how)


def prior_cost(toy: Toy, sigma: float) -> Tensor:
    """Return KL(q(x_t | x_0) || prior) of each clean token at total noise ``sigma``, nats, float64 [v].

    The prior is the distribution after endless noise.
    """
    last, endless = (toy.parts.kernel.transition_matrix(s)[:, : toy.tokens] for s in (sigma, SETTLED))
    prior = endless.mean(1, keepdim=True)
    return (torch.xlogy(last, last) - torch.xlogy(last, prior)).sum(0)


def steps_of(toy: Toy, objective: Objective) -> int:
    """Return the number of steps of a process in discrete time."""
    draw, *_ = pairs(toy, objective, torch.full((1,), 0.5, dtype=torch.float64))
    return max(1, round(float(draw.weight.double().mean())))
