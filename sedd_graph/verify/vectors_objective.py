"""Verification of objectives of vectors on the toy: the least loss, its value, and the bound at the perfect network.

Axes: b batch, l length, d width of a vector, v tokens, k rows of the toy, g grid points.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.gaussian import posterior
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.verify.vectors_context import decoded_nats
from sedd_graph.verify.vectors_expected import expected_loss
from sedd_graph.verify.vectors_toy import Early, Toy, level
from sedd_graph.verify.worst import worst

__all__ = ["check_objective"]

SIGMAS = 7.0
"""Number of standard errors that a mean of random draws may be off; sound draws never are."""
DRAWS = {"full": 100_000, "quick": 40_000}
"""Number of draws for each mean."""
RARE = 0.02
"""Error of the mean bound at a single step that is tolerated, nats, times the number of steps."""
SLACK = 0.02
"""Largest excess of the bound over the entropy, in nats, for an objective in continuous time."""


def check_objective(toy: Toy, output: str, proof: Proof) -> list[Check]:
    """Verify the objective of a process on vectors.

    Args:
        toy: The toy, of one token per row.
        output: Name of the network's output, ``x0`` or ``logits``.
        proof: Strength of the verification.
    """
    times = _times(toy.parts.kernel)
    early = Toy(toy.parts._replace(schedule=Early(toy.parts.schedule)))
    trained = [Toy(one.parts, training=True) for one in (toy, early)]
    return [
        _check_optimum(trained[0], output, times, DRAWS[proof] // 4),
        _check_value(trained, output, times, DRAWS[proof] // 4),
        *_check_bound(toy, early, output, DRAWS[proof]),
    ]


def _times(kernel: VectorKernel) -> list[float]:
    """Return the times at which the loss is verified; in discrete time steps 1 and 2 are among them."""
    if kernel.steps is None:
        return [0.02, 0.2, 0.5, 0.9]
    total = kernel.steps
    return sorted({i / total for i in (1, 2, max(1, total // 50), max(1, total // 4), max(1, total // 2), total)})


def _changed(toy: Toy, output: str, rows: int, change: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
    """Return the perfect network with its output changed: ``change(output, x)``."""
    perfect = toy.denoiser(toy.parts.objective, output, rows)
    run = perfect._run

    def changed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: change(value, inputs["x"].double()) for name, value in run(inputs).items()}

    return Denoiser(changed, toy.parts.kernel, toy.parts.schedule, perfect.attend)


@torch.no_grad()
def _check_optimum(toy: Toy, output: str, times: list[float], count: int) -> Check:
    """Verify that the loss of the best output has slope 0 in several directions, at each time."""
    kernel, schedule, objective = toy.parts[:3]
    generator = torch.Generator().manual_seed(41)
    largest, where = 0.0, times[0]
    directions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda value, x: torch.zeros_like(value).index_fill_(-1, torch.tensor([0]), 1.0),
        lambda value, x: x[..., :1] * torch.zeros_like(value).index_fill_(-1, torch.tensor([0]), 1.0),
        lambda value, x: torch.tanh(3 * x[..., :1]) * torch.ones_like(value).cumsum(-1),
    ]
    if output == "x0":
        residual = _residual(toy)
        directions.append(residual)
    for t in times:
        batch = Batch.of(toy.draw(count, generator))
        at = torch.full((count,), t, dtype=torch.float64)
        draw = objective.draw(batch, kernel, schedule, random=Randomness(generator), t=at)
        for direction in directions:
            losses = []
            for step in (0.1, -0.1):
                denoise = _changed(
                    toy,
                    output,
                    count,
                    lambda v, x, d=direction, h=step: v + h * d(v, x),  # type: ignore[misc]
                )
                losses.append(objective.loss(denoise, draw, batch, kernel, schedule).double())
            slope = losses[0] - losses[1]
            error = float(slope.std()) / math.sqrt(count) + 1e-7
            if not (score := worst(abs(float(slope.mean())) / error)) <= largest:
                largest, where = score, t
    claim = "the loss is least at the declared best estimate, at every time"
    how = f"slope of the mean loss of {count:,} draws in {len(directions)} directions; worst at t = {where:.4g}, in standard errors"
    return Check.below("vectors.optimum", claim, largest, SIGMAS, how, digits=".2f")


def _residual(toy: Toy) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the direction x_t - E[x_t], of unit size at little noise, in which anchored and plain targets differ."""
    deviation = max(toy.start_variance**0.5, 0.05)
    places = toy.clean[:, 0]

    def direction(value: Tensor, x: Tensor) -> Tensor:
        if value.shape[-1] != x.shape[-1]:
            return torch.zeros_like(value)  # an output of tokens beside that of vectors
        away = x - places[torch.cdist(x[:, 0], places).argmin(-1)][:, None]
        return torch.tanh(away / deviation)

    return direction


@torch.no_grad()
def _check_value(toys: Sequence[Toy], output: str, times: list[float], count: int) -> Check:
    """Verify the mean loss at the perfect network with closed forms, integrated on a grid, at each time."""
    objective = toys[0].parts.objective
    claim = "the loss at the best estimate is the sum of its declared terms"
    if not objective.terms:
        return Check("vectors.loss", claim, None, "no terms declared", "the objective declares none")
    generator = torch.Generator().manual_seed(42)
    largest, where = 0.0, times[0]
    read = 0.0 if objective.decoding is None else decoded_nats(toys[0], objective.decoding)
    for toy, t in itertools.product(toys, times):
        kernel, schedule = toy.parts[:2]
        batch = Batch.of(toy.draw(count, generator))
        at = torch.full((count,), t, dtype=torch.float64)
        draw = objective.draw(batch, kernel, schedule, random=Randomness(generator), t=at)
        losses = objective.loss(toy.denoiser(objective, output, count), draw, batch, kernel, schedule).double()
        error = float(losses.std()) / math.sqrt(count) + 1e-6
        if not (score := worst(abs(float(losses.mean()) - expected_loss(toy, t, read)) / error)) <= largest:
            largest, where = score, t
    terms = " + ".join(sorted(objective.terms))
    how = f"mean of {count:,} draws against integrals ({terms}); worst at t = {where:.4g}, in standard errors"
    return Check.below("vectors.loss", claim, largest, SIGMAS, how, digits=".2f")


@torch.no_grad()
def _check_bound(toy: Toy, early: Toy, output: str, count: int) -> list[Check]:
    """Verify the bound at the perfect network, and that it is not below the entropy at others."""
    kernel, schedule, objective = toy.parts[:3]
    generator = torch.Generator().manual_seed(43)
    networks = {
        "perfect": toy.denoiser(objective, output, count),
        "shrunk": _changed(toy, output, count, lambda value, x: 0.9 * value),
        "shifted": _changed(toy, output, count, lambda value, x: value + 0.3 * torch.tanh(x[..., :1])),
    }
    means, errors = {}, {}
    for name, denoise in networks.items():
        batch = Batch.of(toy.draw(count, generator))
        draw = objective.bound_draw(batch, kernel, schedule, random=Randomness(generator))
        nats = objective.bound(denoise, draw, batch, kernel, schedule).double()
        rest = objective.reconstruction(denoise, batch, kernel, schedule, random=Randomness(generator))
        nats = nats if rest is None else nats + rest.double()
        means[name], errors[name] = float(nats.mean()), float(nats.std()) / math.sqrt(count)
    entropy = toy.entropy
    steps = objective.measure == "steps"
    expected = _sum_of_steps(toy) if steps else entropy
    off = worst(0.0, abs(means["perfect"] - expected) - (1e-4 if steps else SLACK)) / errors["perfect"]
    for each in (toy, early) if steps else ():
        off = worst(off, *_each_step(each, each.denoiser(objective, output, count), count, generator))
    below = worst(*((entropy - means[n]) / errors[n] for n in means))
    how = (
        f"{means['perfect']:.5f} +- {errors['perfect']:.5f} nats of {count:,} draws, {expected:.5f} by integrals; entropy "
        f"{entropy:.5f}; worst of the mean and of single steps, in standard errors"
    )
    claim = "the bound at the perfect network is the entropy of the data plus the gap of the steps"
    others = ", ".join(f"{n} {means[n]:.4f} +- {errors[n]:.4f}" for n in means)
    above = "the bound is never below the entropy of the data, whatever the network"
    return [
        Check.below("vectors.bound", claim, off, SIGMAS, how, digits=".2f"),
        Check.below("vectors.bound_above", above, below, SIGMAS, f"{others}; entropy {entropy:.4f} nats", digits=".2f"),
    ]


def _each_step(toy: Toy, denoise: Denoiser, count: int, generator: torch.Generator) -> Iterator[float]:
    """Yield the error of the mean bound at single steps, in standard errors; integrals give the expected values."""
    kernel, schedule, objective = toy.parts[:3]
    end, total = _prior(toy), kernel.steps or 1
    for t in _times(kernel)[1:]:
        batch = Batch.of(toy.draw(count, generator))
        draw = objective.bound_draw(batch, kernel, schedule, random=Randomness(generator))
        draw = dataclasses.replace(draw, t=torch.full_like(draw.t, t))
        nats = objective.bound(denoise, draw, batch, kernel, schedule).double()
        expected = (total - 1) * float(_step_kl(toy, torch.tensor([round(t * total)]))) + end
        # rare rows carry the terms of steps with little noise: a mean may miss all of them
        yield worst(0.0, abs(float(nats.mean()) - expected) - RARE) / (float(nats.std()) / math.sqrt(count) + 1e-4)


def _prior(toy: Toy) -> float:
    """Return E[KL(q(x_1 | token) || N(0, 1))], nats, at the time t = 1."""
    last, width = level(toy.parts.schedule, 1.0), toy.parts.kernel.width
    spread = last * toy.start_variance + 1 - last
    square = float((toy.chances * toy.clean[:, 0].square().sum(-1)).sum())
    return 0.5 * (width * (spread - 1 - math.log(spread)) + last * square)


def _nodes(width: int) -> tuple[Tensor, Tensor]:
    """Return points [g, d] and weights [g] to integrate over a standard normal distribution."""
    line = torch.linspace(-8, 8, 161 if width == 1 else 33, dtype=torch.float64)
    axes = torch.stack(torch.meshgrid(*[line] * width, indexing="ij"), -1).view(-1, width)
    return axes, (-axes.square().sum(-1) / 2).softmax(0)


def _best(toy: Toy, clean: Tensor, index: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t and the best estimate, [n, g, d] each, after the steps ``index`` [n] from the embedding ``clean`` [d]."""
    kernel, total = toy.parts.kernel, toy.parts.kernel.steps or 1
    t = index.double() / total
    signal, spread = toy.levels(t)
    points = signal[:, None, None] * clean + spread.sqrt()[:, None, None] * axes
    at, flat = t.repeat_interleave(len(axes)), points.reshape(-1, 1, len(clean))
    best = toy.parts.objective.optimal(*toy.estimates(flat, at), at, kernel)
    return points, best.view(points.shape)


def _step_kl(toy: Toy, index: Tensor) -> Tensor:
    """Return E[KL(q(x_{i-1} | x_i, token) || p(x_{i-1} | x_i))] at the perfect network for steps ``index``, nats, [n]."""
    kernel, start = toy.parts.kernel, toy.start_variance
    axes, weight = _nodes(kernel.width)
    found = torch.zeros(len(index), dtype=torch.float64)
    bars = [toy.levels((index.double() - back) / (kernel.steps or 1))[0].square() for back in (0, 1)]
    sigma, lower = (-bar.log() for bar in bars)
    true, model = posterior(lower, sigma, start), posterior(lower, sigma)
    for chance, clean in zip(toy.chances.tolist(), toy.clean[:, 0], strict=True):
        points, best = _best(toy, clean, index, axes)
        away = (true.mean(clean.expand_as(points), points) - model.mean(best, points)).square().sum(-1)
        found += chance * (away @ weight) / (2 * true.variance)
    return found


def _sum_of_steps(toy: Toy) -> float:
    """Return the bound at the perfect network, nats: integrals over a grid, summed over all steps.

    Of more than 4,096 steps, about 4,000 are evaluated, and their terms are interpolated.
    """
    kernel = toy.parts.kernel
    total = kernel.steps or 1
    index = torch.arange(2, total + 1)
    if total > 4096:
        dense = torch.logspace(math.log10(2), math.log10(total), 2000, dtype=torch.float64)
        index = torch.cat([dense, torch.linspace(2, total, 2000, dtype=torch.float64)]).round().long().unique()
    terms = torch.cat([_step_kl(toy, part) for part in index.split(200)])
    every = np.interp(np.arange(2, total + 1), index.numpy(), terms.numpy())
    found = _prior(toy) + float(every.sum())
    axes, weight = _nodes(kernel.width)
    for chance, clean, tokens in zip(toy.chances.tolist(), toy.clean[:, 0], toy.rows, strict=True):
        best = _best(toy, clean, torch.ones(1, dtype=torch.int64), axes)[1][0]
        found -= chance * float(kernel.logits(best.float()).double().log_softmax(-1)[:, tokens[0]] @ weight)
    return found
