"""Tests of the random numbers of an objective: times, noisy rows, and the random number generator.

Axes: b rows, l positions, k blocks per row, r = b k blocks in total, n states, p possible contents of one block (n to
the power of its number of positions).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.verify.guards import generators_state
from sedd_graph.verify.objective_terms import copies_of, parted, with_tokens
from sedd_graph.verify.statistics import ONCE, chi_square
from sedd_graph.verify.toy import Toy
from sedd_graph.verify.worst import least, worst

__all__ = ["DrawRows", "Wrong", "draw_faults", "least_time", "many_draws", "random_batch", "random_faults"]

DrawRows = Callable[[Batch, Randomness], tuple[Objective, Draw]]
"""Function that draws noisy rows for a batch, and returns them with the objective of their loss."""
CALLS = 16
"""Number of calls that the draws are spread over, as in training."""
BINS = 8
"""Number of intervals of noise levels in which noisy rows are counted."""
KOLMOGOROV = 2.7
"""Quantile of the Kolmogorov distribution that chance exceeds once in 10^6 tests."""
SIGMAS = 5.5
"""Standard deviations that chance exceeds once in 10^7 tests."""


@dataclasses.dataclass(frozen=True)
class Wrong:
    """An error found in an objective.

    Attributes:
        part: What is wrong: ``draws``, the distribution of times or noisy rows; ``random``, the use of random numbers;
            ``roles``, the treatment of prompts and padding, or the network's inputs; ``loss`` or ``gradient``, of
            single draws; ``tight``, the value of the bound with a perfect network; ``optimum``, the position of the
            minimum; ``positions``, the sum over the positions that are read; ``runs``, an exception was raised.
        text: Description of the error, in most cases with its size.
    """

    part: str
    text: str


def random_batch(toy: Toy, rows: int, generator: torch.Generator, *, roles: bool = False) -> Batch:
    """Return clean rows drawn from the data distribution, with random masks of prompts and padding if ``roles``."""
    chosen = torch.multinomial(toy.law, rows, replacement=True, generator=generator)
    batch = Batch.of(toy.sequences[chosen])
    if not roles:
        return batch
    kind = torch.rand(batch.tokens.shape, generator=generator)
    # text, a token that is noised and not counted, one that is counted and not noised, a prompt, padding
    kind[: rows // 8] = 0.0
    return Batch(batch.tokens, kind < 0.9, (kind < 0.6), (kind < 0.5) | ((kind > 0.6) & (kind < 0.7)))


def many_draws(toy: Toy, draw_rows: DrawRows, rows: int, seed: int) -> tuple[Objective, Draw, Batch]:
    """Draw noisy rows in 16 calls, and concatenate the results.

    Args:
        toy: Data set with a known distribution, from which the clean rows are drawn.
        draw_rows: Function that draws noisy rows for a batch.
        rows: Number of clean rows in all calls together.
        seed: Seed of all random numbers.

    Returns:
        The objective that computes the loss of the last call; the concatenated draw; and its clean rows, row i that of
        noisy row i, so that a clean row with c noisy rows occurs c times.
    """
    generator = torch.Generator().manual_seed(seed)
    draws, batches = [], []
    for _ in range(CALLS):
        batch = random_batch(toy, rows // CALLS, generator)
        objective, draw = draw_rows(batch, Randomness(generator))
        draws.append(draw)
        batches.append(with_tokens(batch, draw))
    joined = Draw(*(torch.cat([getattr(d, f.name) for d in draws]) for f in dataclasses.fields(Draw)))
    batch = Batch(*(torch.cat([getattr(b, f.name) for b in batches]) for f in dataclasses.fields(Batch)))
    return objective, joined, batch


def least_time(draw: Draw) -> float:
    """Return the least time that an objective draws, if its times are drawn from an interval that ends at 1.

    The mean of ``draw.weight`` is the length of this interval, so the result is 1 minus this mean.
    """
    return 1 - float(draw.weight.double().mean())


def draw_faults(toy: Toy, objective: Objective, draw: Draw, batch: Batch) -> list[Wrong]:
    """Return what is wrong with the distribution of many draws (:func:`many_draws`)."""
    n = toy.states
    if draw.xt.shape != batch.tokens.shape or bool((draw.xt < 0).any()) or bool((draw.xt >= n).any()):
        return [Wrong("draws", "xt is not rows of states")]
    found = _times(toy, objective, draw, batch)
    if found:
        return found
    xt, x0 = parted(draw.xt, toy.block), parted(batch.tokens, toy.block)
    patterns = torch.tensor(list(itertools.product(range(n), repeat=toy.block)))
    if objective.measure == "masked":
        expected, level = _masked_chances(toy, x0, patterns), torch.arange(len(x0))
        masked = (xt == toy.parts.kernel.require_mask()).double()
        off = masked[:, 0] - masked.mean(1)
    else:
        level = draw.sigma.double().reshape(-1)
        p = toy.transition(level).transpose(1, 2)[torch.arange(len(x0))[:, None], x0]  # [r, l, n]
        expected = p.new_ones(len(x0), len(patterns))
        for i in range(toy.block):
            expected = expected * p[:, i][:, patterns[:, i]]
        off = ((xt != x0).double() - (1 - p.gather(-1, x0[..., None])[..., 0])).sum(-1)
    seen = F.one_hot(toy.code(xt, n), len(patterns)).double()
    parts = level.argsort(stable=True).chunk(BINS)
    chance = least(*(chi_square(seen[part].sum(0), expected[part].sum(0)) for part in parts))
    if not chance > ONCE:
        found.append(Wrong("draws", f"noisy rows do not follow the kernel: probability by chance {chance:.1e}"))
    # rows are noised independently: products of the deviations of neighbours have mean 0
    for lag in {1, len(xt) // len(batch)}:
        products = off[lag:] * off[:-lag]
        if not abs(float(products.sum())) <= SIGMAS * float(products.square().sum().sqrt()) + 1e-9:
            found.append(Wrong("draws", "the noise of a row depends on that of the row before"))
            break
    return found


def _masked_chances(toy: Toy, x0: Tensor, patterns: Tensor) -> Tensor:
    """Return the probability of each pattern if the number of masks is uniform from 1 to the block length, [r, p]."""
    mask, length = toy.parts.kernel.require_mask(), toy.block
    hidden = patterns == mask
    count = hidden.sum(-1)
    ways = torch.tensor([1.0 / (length * math.comb(length, int(c))) if c else 0.0 for c in count], dtype=torch.float64)
    same = (hidden[None] | (patterns[None] == x0[:, None])).all(-1)
    return same * ways


def _times(toy: Toy, objective: Objective, draw: Draw, batch: Batch) -> list[Wrong]:
    """Return what is wrong with times, noise levels and weights."""
    t, weight, sigma, dsigma = (v.double().reshape(-1) for v in (draw.t, draw.weight, draw.sigma, draw.dsigma))
    every = torch.stack([t, weight, sigma, dsigma])
    if not bool(every.isfinite().all()) or bool((t < 0).any()) or bool((t > 1).any()) or bool((weight < 0).any()):
        return [Wrong("draws", "times, noise levels or weights are not finite, or out of range")]
    found, schedule, limit = list[Wrong](), toy.parts.schedule, KOLMOGOROV / math.sqrt(len(t))
    if objective.measure == "time":
        single = draw.t.reshape(-1)
        for name, given, exact in (
            ("sigma", sigma, schedule.sigma(single).double()),
            ("dsigma", dsigma, schedule.dsigma(single).double()),
        ):
            gap = float(((given - exact).abs() / exact.abs().clamp(min=1e-12)).max())
            if not gap < 1e-4:
                found.append(Wrong("draws", f"{name} is not the schedule's at the drawn times: {gap:.2g} off"))
        lo = 1 - float(weight.mean())
        order = t.argsort()
        covered = weight[order].cumsum(0) / len(t)
        gap = float((covered - (t[order] - lo)).abs().max())
        if not gap < limit or lo < -1e-6 or lo > 0.1:
            found.append(Wrong("draws", f"weighted times are not even from {lo:.4g} to 1: {gap:.3g} off at most"))
    elif objective.measure == "masked":
        mask = toy.parts.kernel.require_mask()
        xt, x0 = parted(draw.xt, toy.block), parted(batch.tokens, toy.block)
        count = (xt == mask).sum(-1)
        if bool(((xt != mask) & (xt != x0)).any()) or bool((count == 0).any()):
            found.append(Wrong("draws", "a noisy row has changed tokens, or no mask"))
        elif not float((weight - toy.block / count).abs().max()) <= 1e-4:
            found.append(Wrong("draws", "weights are not the number of tokens over the number of masks"))
    else:
        found += _steps(toy, objective, draw, limit)
    return found


def _steps(toy: Toy, objective: Objective, draw: Draw, limit: float) -> list[Wrong]:
    """Return what is wrong with the steps of a process in discrete time."""
    t, sigma = draw.t.double().reshape(-1), draw.sigma.double().reshape(-1)
    below = objective.below(draw, toy.parts.kernel, toy.parts.schedule).double().reshape(-1)
    count = float(draw.weight.double().mean())
    order = t.argsort()
    covered = draw.weight.double().reshape(-1)[order].cumsum(0) / len(t) / count
    gap = float((covered - (t[order] - 0.5 / count)).abs().max())
    found = []
    whole = worst(abs(count - round(count)), float((t * count - (t * count).round()).abs().max()))
    if not gap < limit + 0.51 / count or whole > 1e-2:
        found.append(Wrong("draws", f"{count:.4g} steps are not drawn evenly: {gap:.3g} off at most"))
    # each step begins where the next one ends, the first at clean text
    levels, first = torch.unique(t, return_inverse=True)
    start = torch.zeros(len(levels), dtype=torch.float64).scatter(0, first, sigma)
    end = torch.zeros(len(levels), dtype=torch.float64).scatter(0, first, below)
    adjacent = ((levels[1:] - levels[:-1]) * count - 1).abs() < 0.01
    gap = float(((end[1:] - start[:-1]).abs() / start[:-1].clamp(min=1e-12))[adjacent].max()) if adjacent.any() else 0.0
    if not gap < 1e-4 or (levels[0] * count < 1.5 and end[0] != 0) or bool((end >= start).any()):
        found.append(
            Wrong("draws", "the steps are no chain: one does not begin at the noise level where the next ends")
        )
    return found


def random_faults(toy: Toy, draw_rows: DrawRows) -> list[Wrong]:
    """Return what is wrong with the use of random numbers.

    The same seed gives the same draw and another seed another one, whatever was drawn before; global random number
    generators are neither read nor changed; and each rank draws its own rows of the global batch.
    """
    rows, found = 24, list[Wrong]()
    first, other = (random_batch(toy, rows, torch.Generator().manual_seed(s)) for s in (5, 6))

    def draw(batch: Batch, seed: int, start: int = 0, total: int | None = None) -> Draw:
        return draw_rows(batch, Randomness(torch.Generator().manual_seed(seed), start=start, total=total))[1]

    continuous = draw_rows(first, Randomness(torch.Generator()))[0].measure == "time"

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(986)
        before = generators_state()
        one = draw(first, 1)
        if before != generators_state():
            found.append(Wrong("random", "a draw changes a global random number generator"))
        torch.manual_seed(987)
        again = draw(first, 1)
    changed, small = draw(other, 2), draw(first.rows(0, 7), 3)
    if not (_same(one, again) and _same(one, draw(first, 1)) and _same(changed, draw(other, 2))):
        found.append(
            Wrong("random", "the same seed gives another draw: it depends on earlier draws, or a global generator")
        )
    certain = len(one.xt.unique()) == 1 and len(one.t.unique()) == 1  # a single step that hides every token
    if not certain and (
        _same(one, draw(first, 2))
        or (continuous and torch.equal(one.t, draw(first, 2).t))
        or _same(small, draw(first.rows(0, 7), 4))
    ):
        found.append(Wrong("random", "another seed gives the same draw"))
    copies = copies_of(one, first)
    whole = draw(first, 1, 0, rows)
    for start, stop in ((0, 8), (8, rows)):
        own = draw(first.rows(start, stop), 1, start, rows)
        share = Draw(
            *(
                getattr(whole, f.name).unflatten(0, (copies, rows))[:, start:stop].flatten(0, 1)
                for f in dataclasses.fields(Draw)
            )
        )
        if not _same(own, share):
            found.append(Wrong("random", "a rank's rows are not those of the whole batch, drawn by one process"))
            break
    return found


def _same(a: Draw, b: Draw) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Draw))
