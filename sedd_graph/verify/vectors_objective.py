"""Verification of objectives of vectors on the toy: the least loss, its value, and the bound at the perfect network.

Axes: b batch, l length, d width of a vector, v tokens, k rows of the toy, g grid points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sedd_graph.component.check import Check, Proof
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.gaussian import posterior
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.verify.vectors_toy import Toy, level

__all__ = ["check_objective"]

SIGMAS = 7.0
"""Number of standard errors that a mean of random draws may be off; sound draws never are."""
DRAWS = {"full": 200_000, "quick": 40_000}
"""Number of draws for each mean."""
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
    return [
        _check_optimum(toy, output, times, DRAWS[proof] // 4),
        _check_value(toy, output, times, DRAWS[proof] // 4),
        *_check_bound(toy, output, DRAWS[proof]),
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
    worst, where = 0.0, times[0]
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
            if not (score := abs(float(slope.mean())) / error) <= worst:
                worst, where = score, t
    claim = "the loss is least at the declared best estimate, at every time"
    how = f"slope of the mean loss of {count:,} draws in {len(directions)} directions; worst at t = {where:.4g}, in standard errors"
    return Check.below("vectors.optimum", claim, worst, SIGMAS, how, digits=".2f")


def _residual(toy: Toy) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the direction x_t - E[x_t], of unit size at little noise, in which anchored and plain targets differ."""
    deviation = max(toy.start_variance**0.5, 0.05)
    places = toy.clean[:, 0]

    def direction(value: Tensor, x: Tensor) -> Tensor:
        away = x - places[torch.cdist(x[:, 0], places).argmin(-1)][:, None]
        return torch.tanh(away / deviation)

    return direction


@torch.no_grad()
def _check_value(toy: Toy, output: str, times: list[float], count: int) -> Check:
    """Verify the mean loss at the perfect network with closed forms, integrated on a grid, at each time."""
    kernel, schedule, objective = toy.parts[:3]
    claim = "the loss at the best estimate is the sum of its declared terms"
    if not objective.terms:
        return Check("vectors.loss", claim, None, "no terms declared", "the objective declares none")
    generator = torch.Generator().manual_seed(42)
    worst, where = 0.0, times[0]
    denoise = toy.denoiser(objective, output, count)
    for t in times:
        batch = Batch.of(toy.draw(count, generator))
        at = torch.full((count,), t, dtype=torch.float64)
        draw = objective.draw(batch, kernel, schedule, random=Randomness(generator), t=at)
        losses = objective.loss(denoise, draw, batch, kernel, schedule).double()
        error = float(losses.std()) / math.sqrt(count) + 1e-6
        if not (score := abs(float(losses.mean()) - _expected(toy, t)) / error) <= worst:
            worst, where = score, t
    how = f"mean of {count:,} draws against integrals on a grid ({' + '.join(sorted(objective.terms))}); worst at t = {where:.4g}, in standard errors"
    return Check.below("vectors.loss", claim, worst, SIGMAS, how, digits=".2f")


def _grid(width: int, centre: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Return points [g, d] and their weights [g] to integrate over N(centre, deviation^2), centre being [d]."""
    line = torch.linspace(-9, 9, 1801 if width == 1 else 121, dtype=torch.float64)
    axes = torch.stack(torch.meshgrid(*[line] * width, indexing="ij"), -1).view(-1, width)
    weight = (-axes.square().sum(-1) / 2).softmax(0)
    return centre + deviation * axes, weight


def _expected(toy: Toy, t: float) -> float:
    """Return the expected loss of a row of one token at time ``t``, from integrals."""
    kernel, schedule, objective = toy.parts[:3]
    bar, last = level(schedule, t), level(schedule, 1.0)
    spread, width = bar * toy.start_variance + 1 - bar, kernel.width
    probe = torch.zeros(1, 1, width, dtype=torch.float64)
    anchored = bool(objective.optimal(probe, probe + 1, torch.tensor([t], dtype=torch.float64), kernel).sum() > 0)
    square = float((toy.chances * toy.clean[:, 0].square().sum(-1)).sum())
    whole = square + (0 if anchored else width * toy.start_variance)
    found = 0.0
    for chance, clean in zip(toy.chances.tolist(), toy.clean[:, 0], strict=True):
        points, weight = _grid(width, bar**0.5 * clean, spread**0.5)
        at = torch.full((len(points),), t, dtype=torch.float64)
        start, embedding = toy.estimates(points[:, None], at)
        if "mse" in objective.terms:
            best = embedding if anchored else start
            found -= chance * float((weight * best[:, 0].square().sum(-1)).sum()) / width
        if "cross_entropy" in objective.terms:
            row = int((toy.clean[:, 0] == clean).all(-1).nonzero()[0])
            found -= chance * float((weight * toy.posterior(points[:, None], at)[:, row].log()).sum())
        if "rounding" in objective.terms:
            row = int((toy.clean[:, 0] == clean).all(-1).nonzero()[0])
            points, weight = _grid(width, clean, toy.start_variance**0.5)
            logits = kernel.logits(points.float()).double()
            found -= chance * float((weight * logits.log_softmax(-1)[:, toy.rows[row, 0]]).sum())
    if "mse" in objective.terms:
        found += whole / width
    if "last" in objective.terms:
        found += last * (square / width + toy.start_variance)
    return found


@torch.no_grad()
def _check_bound(toy: Toy, output: str, count: int) -> list[Check]:
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
    expected = entropy if objective.measure == "time" else _sum_of_steps(toy)
    slack = SLACK if objective.measure == "time" else 1e-4
    off = max(0.0, abs(means["perfect"] - expected) - slack) / errors["perfect"]
    below = max((entropy - means[n]) / errors[n] for n in means)
    claim = "the bound at the perfect network is the entropy of the data plus the gap of the steps"
    how = (
        f"{means['perfect']:.5f} +- {errors['perfect']:.5f} nats of {count:,} draws; {expected:.5f} by integrals; entropy "
        f"{entropy:.5f}; in standard errors"
    )
    return [
        Check.below("vectors.bound", claim, off, SIGMAS, how, digits=".2f"),
        Check.below(
            "vectors.bound_above",
            "the bound is never below the entropy of the data, whatever the network",
            below,
            SIGMAS,
            ", ".join(f"{n} {means[n]:.4f} +- {errors[n]:.4f}" for n in means) + f"; entropy {entropy:.4f} nats",
            digits=".2f",
        ),
    ]


def _sum_of_steps(toy: Toy) -> float:
    """Return the bound at the perfect network, nats, by integrals over a grid, summed over all steps."""
    kernel, schedule, objective = toy.parts[:3]
    total, width, start = kernel.steps or 1, kernel.width, toy.start_variance
    bars = [level(schedule, i / total) for i in range(total + 1)]
    found = 0.0
    line = torch.linspace(-8, 8, 321 if width == 1 else 41, dtype=torch.float64)
    axes = torch.stack(torch.meshgrid(*[line] * width, indexing="ij"), -1).view(-1, width)
    weight = (-axes.square().sum(-1) / 2).softmax(0)
    for chance, clean, tokens in zip(toy.chances.tolist(), toy.clean[:, 0], toy.rows, strict=True):
        end = bars[-1] * start + 1 - bars[-1]
        found += chance * 0.5 * (width * (end - 1 - math.log(end)) + bars[-1] * float(clean.square().sum()))
        for i in range(1, total + 1):
            spread = bars[i] * start + 1 - bars[i]
            points = (bars[i] ** 0.5 * clean + spread**0.5 * axes)[:, None]
            at = torch.full((len(points),), i / total, dtype=torch.float64)
            best = objective.optimal(*toy.estimates(points, at), at, kernel)
            if i == 1:
                logits = kernel.logits(best[:, 0].float()).double()
                found -= chance * float((weight * logits.log_softmax(-1)[:, tokens[0]]).sum())
                continue
            sigma, lower = (torch.tensor([-math.log(bars[j])], dtype=torch.float64) for j in (i, i - 1))
            true, model = posterior(lower, sigma, start), posterior(lower, sigma)
            away = true.mean(clean.expand(len(points), 1, width), points) - model.mean(best, points)
            found += chance * float((weight * away[:, 0].square().sum(-1)).sum() / (2 * true.variance))
    return found
