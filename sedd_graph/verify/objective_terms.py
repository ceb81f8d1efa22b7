"""What an objective must compute for one draw: the kernel's own loss, weighted by the declared measure, in float64.

Axes: b rows, l positions, k blocks of a row, n states, v data tokens.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.tokens.objective import Objective, for_each
from sedd_graph.verify.toy import Toy

__all__ = [
    "copies_of",
    "even_outputs",
    "expected_loss",
    "parted",
    "predicted",
    "random_outputs",
    "with_tokens",
]


def parted(x: Tensor, block: int) -> Tensor:
    """Return rows [b, l, ...] as blocks [b k, block, ...]."""
    out: Tensor = x.reshape(-1, block, *x.shape[2:])
    return out


def copies_of(draw: Draw, batch: Batch) -> int:
    """Return the number of noisy rows of ``draw`` for each clean row."""
    return len(draw.xt) // len(batch)


def with_tokens(batch: Batch, draw: Draw) -> Batch:
    """Return the batch repeated for each noisy row of ``draw``."""
    return Batch(*(for_each(draw, getattr(batch, f.name)) for f in dataclasses.fields(batch)))


def expected_loss(
    toy: Toy, objective: Objective, outputs: dict[str, Tensor], draw: Draw, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return the loss that the measure declared by the objective and the kernel's own loss give, and its scale.

    Args:
        toy: The toy, for its kernel and schedule.
        objective: The objective, of which only ``measure``, ``block`` and ``below`` are read.
        outputs: Outputs of the network, ``log_score`` or ``log_x0``, [b, l, n].
        draw: The draw, b noisy rows.
        batch: Its clean rows, b rows.

    Returns:
        Loss, nats, float64 [b]; and the factor of the loss of one position, [b], summed over blocks.
    """
    (name, value), kernel, block = next(iter(outputs.items())), toy.parts.kernel, toy.block
    value, xt, x0 = parted(value.double(), block), parted(draw.xt, block), parted(batch.tokens, block)
    counts = parted(batch.loss & batch.corrupt, block)
    sigma, dsigma, weight = (v.double().reshape(-1) for v in (draw.sigma, draw.dsigma, draw.weight))
    factor = weight
    if objective.measure == "time":
        loss = kernel.score_entropy(value, xt, x0, sigma) if name == "log_score" else kernel.nelbo(value, xt, x0, sigma)
        factor = weight * dsigma
    elif objective.measure == "masked":
        free = parted(batch.corrupt, block).sum(-1)
        factor = free / ((xt == kernel.require_mask()) & parted(batch.corrupt, block)).sum(-1).clamp(min=1)
        loss = torch.where(xt == kernel.require_mask(), -value.gather(-1, x0[..., None])[..., 0], 0.0)
    else:
        below = objective.below(draw, kernel, toy.parts.schedule).double().reshape(-1)
        one = F.one_hot(x0, kernel.states).double()
        true = kernel.posterior(one, xt, sigma, below)
        if name == "log_score":
            found = kernel.analytic(value.exp(), xt, sigma, below).clamp(min=0)
            found = found / found.sum(-1, keepdim=True)
        else:
            found = kernel.posterior(value.exp(), xt, sigma, below)
        loss = (torch.xlogy(true, true) - true * found.clamp(min=1e-300).log()).sum(-1)
    nats = factor * torch.where(counts, loss, 0.0).sum(-1)
    return nats.view(len(batch), -1).sum(1), factor.view(len(batch), -1).abs().sum(1)


def predicted(toy: Toy, objective: Objective, raw: Tensor, draw: Draw, name: str) -> dict[str, Tensor]:
    """Return network outputs of the right form for unconstrained numbers.

    Predictions of the clean token are normalised over data tokens, and one-hot at positions that are surely clean. An
    objective with the measure ``steps`` takes scores for those of a distribution, so they are implied by predictions.

    Args:
        toy: The toy.
        objective: The objective.
        raw: Numbers [b, l, n]: logits of the clean token, or log-scores unless the measure is ``steps``.
        draw: Noisy rows, b of them.
        name: ``log_score`` or ``log_x0``.
    """
    if name == "log_x0":
        return {name: _log_x0(toy, raw, draw.xt)}
    score = implied_scores(toy, raw, draw) if objective.measure == "steps" else raw
    return {name: score.scatter(-1, draw.xt[..., None], 0.0)}


def _log_x0(toy: Toy, logits: Tensor, xt: Tensor) -> Tensor:
    """Return log-probabilities of the clean token, [b, l, n]; carried over where the kernel shows clean tokens."""
    kernel = toy.parts.kernel
    law = F.pad(logits[..., : toy.tokens].log_softmax(-1), (0, toy.states - toy.tokens), value=-1e6)
    if kernel.clamp_safe and kernel.mask is not None:
        carried = F.one_hot(xt, toy.states).to(law.dtype).clamp(min=1e-300).log().clamp(min=-1e6)
        law = torch.where((xt == kernel.mask)[..., None], law, carried)
    return law


def random_outputs(toy: Toy, objective: Objective, draw: Draw, name: str, generator: torch.Generator) -> Tensor:
    """Return random numbers for :func:`predicted`.

    A tenth of the logits are far off, up to 9. Log-scores are those that random predictions imply, and for every second
    row off by random factors too.

    Args:
        toy: The toy.
        objective: The objective.
        draw: Noisy rows, b of them.
        name: ``log_score`` or ``log_x0``.
        generator: Random number generator.

    Returns:
        float32 [b, l, n].
    """
    raw = torch.randn(*draw.xt.shape, toy.states, generator=generator)
    scale = torch.where(torch.rand(len(raw), generator=generator) < 0.1, 3.0, 1.0)[:, None, None]
    logits = (raw * scale).clamp(-9, 9)
    if name == "log_x0" or objective.measure == "steps":
        return logits
    odd = torch.arange(len(raw))[:, None, None] % 2 == 1
    return implied_scores(toy, logits, draw) + torch.where(odd, raw, 0.0)


def even_outputs(toy: Toy, objective: Objective, draw: Draw, name: str) -> Tensor:
    """Return the numbers for :func:`predicted` that make all tokens equally likely, float32 [b, l, n]."""
    even = torch.zeros(*draw.xt.shape, toy.states)
    return even if name == "log_x0" or objective.measure == "steps" else implied_scores(toy, even, draw)


def implied_scores(toy: Toy, logits: Tensor, draw: Draw) -> Tensor:
    """Return the log-scores that predictions with the given logits imply, [b, l, n]; 0 for impossible states."""
    log_x0 = parted(_log_x0(toy, logits.double(), draw.xt), toy.block)
    score = toy.parts.kernel.log_score(log_x0, parted(draw.xt, toy.block), draw.sigma.double().reshape(-1))
    return torch.where(score < -1e3, 0.0, score).to(logits.dtype).reshape(logits.shape)
