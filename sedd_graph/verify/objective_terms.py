"""The loss that an objective must compute for one draw, in float64, for comparison with the one that it does compute.

It is the kernel's own loss of each position, with the weight that :attr:`Objective.measure` declares (the loss
estimates an integral over time, a sum over numbers of masked tokens, or a sum over discrete time steps).

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
    """Return the loss that an objective must compute for a draw: the kernel's own loss with the declared weights.

    Args:
        toy: Data set with a known distribution, which provides the kernel, the schedule and the block size.
        objective: The objective, of which only :attr:`Objective.measure` and :meth:`Objective.below` are read.
        outputs: One network output, ``log_score`` or ``log_x0``, [b, l, n].
        draw: The noisy rows, b of them.
        batch: The clean row of each noisy row, b rows.

    Returns:
        The loss of each row, nats, float64 [b]; and the absolute weight of the loss of a position, float64 [b], summed
        over the blocks of the row.
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
            if objective.raw_first:
                found = torch.where((below == 0)[:, None, None], value.exp(), found)
        loss = (torch.xlogy(true, true) - true * found.clamp(min=1e-300).log()).sum(-1)
    nats = factor * torch.where(counts, loss, 0.0).sum(-1)
    return nats.view(len(batch), -1).sum(1), factor.view(len(batch), -1).abs().sum(1)


def predicted(toy: Toy, objective: Objective, raw: Tensor, draw: Draw, name: str) -> dict[str, Tensor]:
    """Convert unconstrained numbers into a valid network output.

    ``log_x0`` is normalised over data tokens. Where the kernel guarantees that a visible token is the clean one
    (:attr:`Kernel.clamp_safe`), it is the log of a one-hot vector. ``log_score`` is set to 0 at the current token. For
    an objective in discrete time (:attr:`Objective.measure` ``steps``), scores are computed from a prediction of the
    clean token, since its loss is only valid for the scores of a distribution.

    Args:
        toy: Data set with a known distribution, and its kernel.
        objective: The objective.
        raw: Unconstrained numbers, [b, l, n]: log-scores if ``name`` is ``log_score`` and the measure is not ``steps``;
            otherwise logits of the clean token.
        draw: Noisy rows, b of them.
        name: Kind of output, ``log_score`` or ``log_x0``.

    Returns:
        The output by name, [b, l, n].
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
    """Return random numbers that :func:`predicted` converts into a network output.

    Logits are normal with standard deviation 1, or 3 in about a tenth of the rows, clamped to [-9, 9]. Log-scores are
    computed from the prediction with these logits; in every second row standard normal numbers are added to them.

    Args:
        toy: Data set with a known distribution, and its kernel.
        objective: The objective.
        draw: Noisy rows, b of them.
        name: Kind of output, ``log_score`` or ``log_x0``.
        generator: Random number generator.

    Returns:
        Log-scores or logits, as ``raw`` of :func:`predicted`, float32 [b, l, n].
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
