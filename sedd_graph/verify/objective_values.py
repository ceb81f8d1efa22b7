"""Enumeration of an objective over all pairs of a clean and a noisy row: the value of its bound.

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
from sedd_graph.verify.objective_single import rest_of
from sedd_graph.verify.objective_terms import (
    expected_loss,
)
from sedd_graph.verify.toy import Toy

__all__ = ["Value", "decoded", "pairs", "steps_of", "value_of"]

BREAKS = (0.0, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99, 0.999, 1.0)
"""Ends of the intervals of the quadrature over time, as shares of the interval from the least time to 1."""
ROWS_AT_ONCE = 60_000
"""Number of pairs that are evaluated in one call."""
MOST_ROWS = 30_000
"""Number of pairs per quadrature node that are enumerated for a process in discrete time."""


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


def steps_of(toy: Toy, objective: Objective) -> int:
    """Return the number of steps of a process in discrete time."""
    draw, *_ = pairs(toy, objective, torch.full((1,), 0.5, dtype=torch.float64))
    return max(1, round(float(draw.weight.double().mean())))
