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
    "expected_loss",
    "implied_scores",
    "parted",
    "predicted",
    "random_outputs",
    "with_tokens",
]


def parted(x: Tensor, block: int) -> Tensor:
    """Return rows [b, l, ...] as blocks [b k, block, ...]."""
    return x.unflatten(1, (-1, block)).flatten(0, 1)


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


def predicted(toy: Toy, raw: Tensor, xt: Tensor, name: str) -> dict[str, Tensor]:
    """Return network outputs of the right form for unconstrained numbers.

    Predictions of the clean token are normalised over data tokens, and one-hot at positions that are surely clean.

    Args:
        toy: The toy, for its kernel.
        raw: Numbers [b, l, n]; log-scores, or logits of the clean token.
        xt: Noisy rows, int64 [b, l].
        name: ``log_score`` or ``log_x0``.
    """
    kernel = toy.parts.kernel
    if name == "log_score":
        return {name: raw.scatter(-1, xt[..., None], 0.0)}
    law = F.pad(raw[..., : toy.tokens].log_softmax(-1), (0, toy.states - toy.tokens), value=-1e6)
    if kernel.clamp_safe and kernel.mask is not None:
        carried = F.one_hot(xt, toy.states).to(law.dtype).clamp(min=1e-300).log().clamp(min=-1e6)
        law = torch.where((xt == kernel.mask)[..., None], law, carried)
    return {name: law}


def random_outputs(toy: Toy, objective: Objective, draw: Draw, name: str, generator: torch.Generator) -> Tensor:
    """Return raw numbers for :func:`predicted`: random logits, or the scores that random predictions imply.

    A tenth of the logits are far off, up to 9. Scores of every second row are off by random factors too, unless the
    objective takes them for those of a distribution (``measure`` is ``steps``).

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
    if name != "log_score":
        return logits
    score = implied_scores(toy, logits, draw)
    if objective.measure == "steps":
        return score
    return score + torch.where(torch.arange(len(raw))[:, None, None] % 2 == 0, raw, 0.0)


def implied_scores(toy: Toy, logits: Tensor, draw: Draw) -> Tensor:
    """Return the log-scores that predictions with the given logits [b, l, n] imply, float32; 0 for impossible states."""
    log_x0 = parted(predicted(toy, logits.double(), draw.xt, "log_x0")["log_x0"], toy.block)
    score = toy.parts.kernel.log_score(log_x0, parted(draw.xt, toy.block), draw.sigma.double().reshape(-1))
    return torch.where(score < -1e3, 0.0, score).float().reshape(logits.shape)
