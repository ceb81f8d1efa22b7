"""Verification of the probability-flow ODE of a process on vectors: likelihood, order of the sampler, noise levels.

The toy's density and score are known exactly (:mod:`sedd_graph.verify.vectors_toy`). Axes: b batch, l length, d width of a
vector, k rows of the toy.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import FittedSchedule
from sedd_graph.diffusion.vectors.flow import Flow, first_time
from sedd_graph.diffusion.vectors.parts import VectorParts
from sedd_graph.diffusion.vectors.sampler import VectorWalk, VectorWalkSettings
from sedd_graph.verify.vectors_toy import Toy, level
from sedd_graph.verify.worst import worst

__all__ = ["check_fitted", "check_flow", "check_order"]

EXACT = 1e-3
"""Largest error of the ODE's likelihood with the exact score, nats."""
STEPS = {"full": 120, "quick": 80}
"""Number of Heun steps of that likelihood, which is extrapolated from this number and twice of it (Richardson)."""
MOST = 2000
"""Largest number of steps, for schedules under which the ODE is stiff."""
ROWS = 24
"""Number of rows whose likelihood is compared."""
SIGMAS = 6.0
"""Number of standard errors that a mean of random draws may be off."""
PROBES = {"full": 2000, "quick": 1000}
"""Number of probes of Hutchinson's estimate that are averaged."""
COARSE = 24
"""Number of steps from which the order of a sampler is measured, by doubling it twice."""
TOLERANCE = 0.35
"""Largest difference of the measured order from the declared one."""


def check_flow(toy: Toy, output: str, proof: Proof) -> list[Check]:
    """Verify the ODE likelihood of an objective, if it has one, with the exact score of the toy.

    Args:
        toy: The toy, of two tokens per row.
        output: Name of the network's output, ``x0`` or ``logits``.
        proof: Strength of the verification.
    """
    flow = toy.parts.objective.flow(toy.parts.kernel, toy.parts.schedule)
    if flow is None:
        return []
    return [_check_likelihood(toy, flow, output, STEPS[proof]), _check_divergence(toy, flow, output, PROBES[proof])]


def _rows(toy: Toy, count: int, seed: int) -> tuple[Batch, Tensor]:
    """Return ``count`` rows of the toy, each row of tokens at least once if it fits, and normal noise [b, l, d]."""
    generator = torch.Generator().manual_seed(seed)
    rows = toy.rows[torch.arange(count) % len(toy.rows)]
    return Batch.of(rows), torch.randn(*rows.shape, toy.parts.kernel.width, generator=generator)


@torch.no_grad()
def _check_likelihood(toy: Toy, flow: Flow, output: str, steps: int) -> Check:
    """Verify the terms of the likelihood against the density of the mixture at the lowest noise, by enumeration."""
    batch, noise = _rows(toy, ROWS, 91)
    denoise = toy.denoiser(toy.parts.objective, output, len(batch))
    start = torch.full((len(batch),), first_time(toy.parts.schedule), dtype=torch.float64)
    signal, variance = (v[:, None, None] for v in toy.levels(start))
    y = signal / variance.sqrt() * toy.parts.kernel.embed(batch.tokens).double() + noise.double()
    log_p = toy.logits(variance.sqrt() * y, start).gather(-1, batch.tokens[..., None])[..., 0]
    exact = -log_p.sum(-1) - _log_density(toy, y, start) - noise.double().square().sum((1, 2)) / 2
    errors: list[Tensor] = []
    error, count = math.inf, steps
    # more steps where these are not enough: what is wrong stays so in the limit
    while len(errors) < 2 or (not error < EXACT and count <= MOST):
        sharp = dataclasses.replace(flow, steps=count, method="heun", probes=0)
        found = sharp.likelihood(denoise, batch, Randomness(torch.Generator().manual_seed(0)), noise=noise)
        # the flow begins with a normal density, to which the mixture at the highest noise is close
        normal = -found.end.double().square().sum((1, 2)) / 2
        errors.append(found.nats - exact - _log_density(toy, found.end.double(), torch.ones_like(start)) + normal)
        if len(errors) > 1:
            error = float(((4 * errors[-1] - errors[-2]) / 3).abs().max())
        count *= 2
    claim = "with the exact score, the likelihood of the ODE is the density of the mixture"
    how = f"{len(batch)} rows of {toy.length} tokens, {count // 4} and {count // 2} Heun steps extrapolated, exact divergence, nats per row; limit {EXACT:g}"
    return Check.below("vectors.ode_likelihood", claim, error, EXACT, how)


def _log_density(toy: Toy, y: Tensor, t: Tensor) -> Tensor:
    """Return the log-density of y = x_t / sqrt(1 - alpha_bar), [b, l, d], at times ``t`` [b], float64 [b].

    The constant of a normal density is left out.
    """
    signal, variance = (v[:, None, None, None] for v in toy.levels(t))
    away = y[:, None] - signal / variance.sqrt() * toy.clean
    return (toy.chances.log() - away.square().sum((-2, -1)) / 2).logsumexp(-1)


@torch.no_grad()
def _check_divergence(toy: Toy, flow: Flow, output: str, probes: int) -> Check:
    """Verify that the declared estimate of the divergence is unbiased, in one Euler step."""
    batch, noise = _rows(toy, 1, 92)
    many = Batch(*(getattr(batch, f.name).expand(probes, -1) for f in dataclasses.fields(batch)))
    noise = 0.5 * noise.expand(probes, -1, -1)
    values = []
    for rows, count in ((many, flow.probes), (batch, 0)):
        single = dataclasses.replace(flow, steps=2, method="euler", probes=count)
        denoise = toy.denoiser(toy.parts.objective, output, len(rows))
        random = Randomness(torch.Generator().manual_seed(93))
        values.append(single.likelihood(denoise, rows, random, noise=noise[: len(rows)]).volume)
    estimates, exact = values
    error = float(estimates.std()) / math.sqrt(probes) + 1e-6 * (1 + float(exact.abs()))
    score = abs(float(estimates.mean() - exact)) / error
    claim = "Hutchinson's estimate of the divergence is unbiased"
    how = f"mean of {probes:,} estimates, {float(estimates.mean()):.5f}, against {float(exact):.5f} by all derivatives, in standard errors"
    return Check.below("vectors.divergence", claim, score, SIGMAS, how, digits=".2f")


@torch.no_grad()
def check_order(toy: Toy, output: str) -> list[Check]:
    """Verify the declared order of a sampler that draws no noise after the start, by halving its steps.

    The order is measured on the vectors before the last evaluation, from the same noise. Samplers that draw noise, and
    processes in discrete time, are not measured.

    Args:
        toy: The toy, of two tokens per row.
        output: Name of the network's output.
    """
    sampler = toy.parts.sampler
    if toy.parts.kernel.steps is not None:
        return []
    ends = [_end(toy, output, COARSE * factor, 94) for factor in (1, 2, 4)]
    if not torch.equal(ends[0], _end(toy, output, COARSE, 94, other=True)):
        return []
    first, second = ((a - b).abs().mean() for a, b in ((ends[0], ends[1]), (ends[1], ends[2])))
    order = math.log2(float(first / second)) if float(second) > 0 else math.inf
    claim = f"the sampler has the declared order {sampler.order:g}"
    how = f"vectors after {COARSE}, {2 * COARSE} and {4 * COARSE} steps from the same noise; measured order {order:.2f}"
    return [Check.below("vectors.order", claim, abs(order - sampler.order), TOLERANCE, how, digits=".2f")]


def _end(toy: Toy, output: str, steps: int, seed: int, *, other: bool = False) -> Tensor:
    """Return the vectors before the last evaluation, [b, l, d], for noise of ``seed``.

    Args:
        toy: The toy.
        output: Name of the network's output.
        steps: Number of steps.
        seed: Seed of the initial noise.
        other: True: random numbers after the initial noise are others.
    """
    parts, count = toy.parts, 128
    seen: list[Tensor] = []
    walks: list[VectorWalk] = []
    settings = VectorWalkSettings(
        kernel=parts.kernel,
        schedule=parts.schedule,
        generator=torch.Generator().manual_seed(seed),
        tokens=torch.zeros(count, toy.length, dtype=torch.int64),
        free=torch.ones(count, toy.length, dtype=torch.bool),
        on_step=lambda _, __: seen.append(walks[0].x.clone()) if walks else None,
    )
    walk = VectorWalk(toy.denoiser(parts.objective, output, count), settings, clamp=False)
    if other:
        settings.generator.manual_seed(seed + 1)
    walks.append(walk)
    # equal steps of time between ends that do not depend on their number
    times = torch.linspace(0.98, 0.05, steps + 1, dtype=torch.float64)
    parts.sampler.walk(walk, times)
    return seen[-2]


@torch.no_grad()
def check_fitted(parts: VectorParts, proof: Proof) -> list[Check]:
    """Verify a schedule that is fitted to the cross-entropy: its noise levels are drawn as the fitted curve rises.

    Args:
        parts: Components of the process.
        proof: Strength of the verification.
    """
    schedule = parts.schedule
    if not isinstance(schedule, FittedSchedule):
        return []
    count = 100_000 if proof == "full" else 20_000
    batch = Batch.of(torch.zeros(count, 1, dtype=torch.int64))
    drawn = [
        draw(batch, parts.kernel, schedule, random=Randomness(torch.Generator().manual_seed(95)))
        for draw in (parts.objective.draw, parts.objective.bound_draw)
    ]

    def curve(sigma: Tensor) -> Tensor:
        return schedule.fit(sigma, torch.zeros_like(sigma)).sqrt()

    ends = curve(schedule.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    apart, away = 0.0, 0.0
    for draw in drawn:
        sigma = schedule.sigma(draw.t).sort().values
        cdf = (curve(sigma) - ends[0]) / (ends[1] - ends[0])
        place = torch.arange(count, dtype=torch.float64) / count
        apart = worst(apart, float((cdf - place).abs().max()), float((cdf - place - 1 / count).abs().max()))
    low, high = level(schedule, 1e-300), level(schedule, 1.0)
    area = 0.5 * (low / (1 - low) - high / (1 - high))
    if parts.objective.measure == "time":
        t, weight = drawn[1].t, drawn[1].weight.double()
        # the weights are half the fall of the signal-to-noise ratio in time: their mean over t > 1/2 is known
        middle = level(schedule, 0.5)
        half = 0.5 * (middle / (1 - middle) - high / (1 - high))
        late = torch.where(t > 0.5, weight, 0.0)
        away = abs(float(late.mean()) - half) / (half + 0.01 * area)
    limit = 2.0 / math.sqrt(count)
    return [
        Check.below(
            "vectors.proposal",
            "noise levels are drawn in proportion to the rise of the fitted cross-entropy",
            apart,
            limit,
            f"Kolmogorov-Smirnov distance of {count:,} draws each for training and evaluation; limit {limit:.4f}",
            digits=".5f",
        ),
        Check.below(
            "vectors.weight",
            "the importance weights of the bound integrate half the fall of the signal-to-noise ratio",
            away,
            0.03,
            "mean over the draws of the second half of time, relative",
            digits=".4f",
        ),
    ]
