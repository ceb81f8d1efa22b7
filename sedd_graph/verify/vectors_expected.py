"""Expected loss of a perfect network on the toy of processes on vectors, by integration on a grid.

Axes: d width of a vector, g grid points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sedd_graph.verify.vectors_toy import Toy, level

__all__ = ["expected_loss"]


def _grid(width: int, centre: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Return points [g, d] and their weights [g] to integrate over N(centre, deviation^2), centre being [d]."""
    line = torch.linspace(-9, 9, 1801 if width == 1 else 121, dtype=torch.float64)
    axes = torch.stack(torch.meshgrid(*[line] * width, indexing="ij"), -1).view(-1, width)
    weight = (-axes.square().sum(-1) / 2).softmax(0)
    return centre + deviation * axes, weight


def expected_loss(toy: Toy, t: float, read: float) -> float:
    """Return the expected loss of a row of one token at time ``t``, from integrals.

    Args:
        toy: The toy.
        t: Time.
        read: Cross-entropy of reading tokens, nats, of an objective that trains it.
    """
    kernel, schedule, objective = toy.parts[:3]
    bar, last = level(schedule, t), level(schedule, 1.0)
    spread, width = bar * toy.start_variance + 1 - bar, kernel.width
    probe = torch.zeros(1, 1, width, dtype=torch.float64)
    anchored = bool(objective.optimal(probe, probe + 1, torch.tensor([t], dtype=torch.float64), kernel).sum() > 0)
    square = float((toy.chances * toy.clean[:, 0].square().sum(-1)).sum())
    whole = square + (0 if anchored else width * toy.start_variance)
    found = 0.0
    decoding = objective.decoding
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
    if decoding is not None:
        ratio = torch.tensor([math.log(bar / (1 - bar))], dtype=torch.float64)
        found *= (1 - decoding.share) * float(objective.emphasis(ratio))
    if decoding is not None and "decoding" in objective.terms:
        found += decoding.share * read
    if "last" in objective.terms:
        found += last * (square / width + toy.start_variance)
    return found
