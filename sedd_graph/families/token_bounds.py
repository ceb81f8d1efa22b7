"""Bounds on -log p of single rows of tokens, from sets of masks that are drawn together for each row.

Axes: b batch, l length, k blocks of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.mask_sets import MaskSets, exact_sets, mask_sets
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.engine.network import Network
from sedd_graph.families.token_loss import TokenLoss

__all__ = ["HALVES", "masked_bounds"]

HALVES = 2
"""Number of independent estimates of a row, whose difference gives the standard error."""


def masked_bounds(
    nats: TokenLoss,
    objective: Objective,
    kernel: Kernel,
    network: Network,
    batch: Batch,
    *,
    seeds: Sequence[int],
    draws: int,
    at_once: int,
) -> Tensor:
    """Estimate the bound of each row by itself, for an objective over the number of masks (:attr:`Objective.over`).

    Arguments and result as of :meth:`sedd_graph.engine.process.Process.row_bounds`. Positions that may not be attended to
    are masks.

    Args:
        nats: The losses.
        objective: The objective of evaluation; its loss is proportional to :attr:`Draw.weight`.
        kernel: A kernel with a mask.
        network: As of ``row_bounds``, and the other arguments, too.
        batch: Clean rows.
        seeds: Seed of each row.
        draws: Number of evaluations of each row.
        at_once: Largest number of rows that the network evaluates at a time.
    """
    sets = [
        _sets(row, seed, draws, block=objective.block or batch.width)
        for row, seed in zip(_free(batch), seeds, strict=True)
    ]
    jobs = [
        (row, half, at)
        for row, halves in enumerate(sets)
        for half, own in enumerate(halves)
        for at in np.flatnonzero(own.masks.any(1)).tolist()
    ]
    found = torch.zeros(len(batch), HALVES, dtype=torch.float64, device=network.device)
    mask, random = kernel.require_mask(), Randomness(torch.Generator(network.device))
    for start in range(0, len(jobs), at_once):
        part = jobs[start : start + at_once]
        rows = torch.tensor([row for row, _, _ in part], device=network.device)
        own = batch.take(rows)
        chosen = torch.from_numpy(np.stack([sets[row][half].masks[at] for row, half, at in part])).to(network.device)
        factors = torch.from_numpy(np.stack([sets[row][half].factors[at] for row, half, at in part])).to(network.device)
        xt = own.tokens.masked_fill(chosen | ~own.attend, mask)
        draw = objective.corrupt(own, kernel, nats.schedule, random=random, xt=xt)
        draw = dataclasses.replace(draw, weight=draw.weight * factors.reshape(draw.weight.shape).float())
        each, _ = nats(network.model, objective, draw, own, use="bound")
        sizes = torch.tensor([len(sets[row][half].masks) for row, half, _ in part], device=network.device)
        halves = torch.tensor([half for _, half, _ in part], device=network.device)
        found.index_put_((rows, halves), each.double() / sizes, accumulate=True)
    single = torch.tensor([len(halves) == 1 for halves in sets], device=network.device)
    found[:, 1] = torch.where(single, found[:, 0] if draws > 1 else torch.nan, found[:, 1])
    return torch.where((batch.corrupt & batch.loss).any(1)[:, None], found, 0.0)


def _free(batch: Batch) -> list[np.ndarray]:
    return list(batch.corrupt.cpu().numpy())


def _sets(free: np.ndarray, seed: int, draws: int, *, block: int) -> list[MaskSets]:
    """Return the sets of one row: of two independent halves; or of one, where it is exact or has a single set."""
    generator = np.random.default_rng(seed)
    exact = len(free) == block and exact_sets(free) <= draws
    if exact or draws == 1:
        return [mask_sets(free, draws, block=block, generator=generator)]
    sizes = (draws - draws // HALVES, draws // HALVES)
    return [mask_sets(free, size, block=block, generator=generator) for size in sizes]
