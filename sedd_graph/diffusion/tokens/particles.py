"""Importance sampling of rows under conditions: many rows are drawn for each one that is returned.

A sampler under a condition draws each token from the model's distribution, restricted to the tokens that the condition
permits and renormalised. The importance weight of a row is the product, over these draws, of the probability that the
model gives to the permitted tokens. It equals the ratio of the model's probability of the row (and of its order of
unmasking) to the sampler's; tokens that are sampled jointly given that the row matches a regular expression contribute
a further factor. Rows that are chosen in proportion to their weights therefore have the model's distribution given the
condition, up to an error that falls as 1 / particles. Axes: b rows, l length, n states.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sedd_graph.diffusion.categorical import sharpen
from sedd_graph.diffusion.draws import Draws

__all__ = ["Chosen", "ImportanceWeights", "choose"]


class ImportanceWeights:
    """Log importance weights of the rows of a sampling run.

    Args:
        rows: Number of rows, b.
        base: Tokens that the sampler may draw without conditions, bool [n].
        temperature: Temperature of sampling, which is part of the distribution without conditions.

    Attributes:
        log: Log-weight of each row so far, nats, float64 [b].
    """

    def __init__(self, rows: int, base: Tensor, temperature: float) -> None:
        self.log = torch.zeros(rows, dtype=torch.float64, device=base.device)
        self._base, self._temperature = base, temperature

    def permitted(self, weights: Tensor, allowed: Tensor) -> Tensor:
        """Return the log-probability, without conditions, that the new token at each position is an allowed one.

        Args:
            weights: Weights of the new token at m positions, before the temperature is applied, [m, n].
            allowed: bool [n] or [m, n], tokens that the condition allows.

        Returns:
            Nats, float64 [m]; minus infinity where no allowed token has weight.
        """
        free = sharpen(weights * self._base, temperature=self._temperature, top_p=1.0)
        return ((free * allowed).sum(-1) / free.sum(-1)).nan_to_num(0.0).log()

    def add(self, row: Tensor, log_share: Tensor) -> None:
        """Multiply the importance weight of each row by a factor for each of its positions that change.

        Args:
            row: Rows of the m positions that change, int64 [m].
            log_share: Logarithms of the factors, [m], such as those that :meth:`permitted` returns.
        """
        self.log = self.log.index_add(0, row, log_share)

    def add_rows(self, rows: Tensor, before: Tensor, after: Tensor) -> None:
        """Multiply the importance weights of rows that must match a regular expression by their factor for one step.

        The factor is p(match) before the step / p(match) after it, where p(match) is the probability that the row
        matches if its masks are replaced independently of each other.

        Args:
            rows: bool [b], the r rows in which the step changes positions.
            before: log p(match) before the tokens of the step are drawn, [r].
            after: log p(match) given these tokens, [r].
        """
        change = torch.where(before == -torch.inf, -torch.inf, before - after)
        self.log = self.log.index_add(0, rows.nonzero()[:, 0], change)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Rows chosen among particles.

    Attributes:
        index: Index of the chosen row of each group, int64 [groups].
        effective: Effective number of particles, averaged over groups: (sum of weights)^2 / sum of squared weights. Near
            1, the distribution is hardly corrected.
    """

    index: Tensor
    effective: float


def choose(log_weight: Tensor, particles: int, *, draws: Draws) -> Chosen:
    """Choose one row of each group of particles, with probability proportional to its weight.

    Args:
        log_weight: Log-weights, float64 [groups * particles]; rows of a group are adjacent.
        particles: Number of rows per group.
        draws: Random numbers of the run.
    """
    grouped = log_weight.view(-1, particles)
    none = grouped.amax(-1, keepdim=True) == -torch.inf  # the model gives no row of the group any probability
    share = torch.where(none, 0.0, grouped).softmax(-1)
    first = torch.arange(len(grouped), device=share.device) * particles
    effective = float((1 / share.square().sum(-1)).mean())
    return Chosen(first + draws.select(share), effective)
