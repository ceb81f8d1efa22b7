"""Law of the reverse chain of a kernel in discrete time with a perfect network, by enumeration of all rows.

Each step draws all positions independently given the whole row, so the law differs from that of the data, by less the
more steps there are. Axes: r rows (all states to the power of the length), l positions, n states, v data tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.check import Check
from sedd_graph.verify.statistics import chi_distance
from sedd_graph.verify.toy import Toy
from sedd_graph.verify.worst import worst

__all__ = ["chain_law", "check_chain"]


def chain_law(toy: Toy, steps: int, total: int) -> Tensor:
    """Return the distribution of samples after ``steps`` of the ``total`` steps of a kernel, evenly chosen.

    Args:
        toy: Data set with a known distribution.
        steps: Number of steps of the sampler, at most ``total``.
        total: Number of steps of the kernel.

    Returns:
        Probability of each sequence of data tokens, float64, in the order of ``toy.sequences``.
    """
    n, length, p = toy.states, toy.length, toy.parts.kernel.transition_matrix
    rows = torch.tensor(list(itertools.product(range(n), repeat=length)))
    visited = [round(v) for v in torch.linspace(total, 0, steps + 1, dtype=torch.float64).tolist()]
    prior = p(float(total))[:, : toy.tokens].mean(1)
    law = prior[rows].prod(1)
    for now, below in itertools.pairwise(visited):
        like = p(float(now))[rows][..., : toy.tokens]
        clean = F.pad(toy.others(like), (0, n - toy.tokens))
        joint = p(float(now), float(below))[rows] * (clean @ p(float(below)).T)
        each = joint / joint.sum(-1, keepdim=True).clamp(min=1e-300)
        after = torch.ones(len(rows), len(rows), dtype=torch.float64)
        for i in range(length):
            after = after * each[:, i][:, rows[:, i]]
        law = law @ after
    return law[toy.code(toy.sequences, n)]


def check_chain(found: Mapping[int, Tensor], toy: Toy, total: int, rows: int) -> tuple[Check, float]:
    """Verify that samples follow :func:`chain_law`.

    Args:
        found: Share of each sequence of the toy among samples, float64 [s], by number of steps.
        toy: Data set with a known distribution.
        total: Number of steps of the kernel.
        rows: Number of samples of each entry of ``found``.

    Returns:
        The check; and the largest chi-distance between the law of the chain and that of the data.
    """
    texts, holds, bias = [], True, 0.0
    for steps, shares in found.items():
        law = chain_law(toy, steps, total)
        distance, chance, _ = chi_distance(shares, law, rows=rows)
        holds = holds and distance < chance
        bias = worst(bias, float(((law - toy.law).square() / toy.law).sum().sqrt()))
        apart = float((law - toy.law).abs().sum() / 2)
        texts.append(
            f"chi {distance:.4f} at {steps} steps (chance alone: up to {chance:.4f}), a model whose total variation from "
            f"the data is {apart:.4f}"
        )
    claim = "with a perfect network samples follow the model of the steps that are taken"
    how = f"enumeration of all rows, {rows:,} samples of {toy.length} dependent tokens each; the kernel has {total:,} steps"
    return Check("sampler.law", claim, holds, "; ".join(texts), how), bias
