"""Reference of the training loss of strings for arbitrary outputs, by its definition, without the objective's ``loss``.

Axes: b noise levels, s strings of the table, w positions of a padded string.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.strings.strings import Strings
from sedd_graph.verify.string_forced import ForcedDraws, Outputs, Sums

__all__ = ["Reference"]


class Reference:
    """Reference for the mean training loss of arbitrary network outputs, up to a term that no output affects.

    It is computed by the definition of the loss, from enumerated regression targets, without the objective's ``loss``.
    At a noisy string of probability p, a log-rate u contributes p exp(u) - R u for every possible edit, where R is the
    sum of the edit's targets over all cases with that noisy string, weighted by their probabilities. An output that is
    a log-probability u contributes -R u. Both are multiplied by the factor of the edit in the reverse rates.

    Args:
        forced: The table of cases (a clean string with one way to noise it), with the objective.
        found: The cases that enter the mean at each noise level.
        sigma: Total noise, float64 [b].
        slope: Derivative of sigma(t) at each noise level times the declared factor of the training loss, float64 [b].
    """

    def __init__(self, forced: ForcedDraws, found: Sums, sigma: Tensor, slope: Tensor) -> None:
        self.table, self.objective, count = forced.table, forced.objective, len(forced.table.strings)
        at = (found.level, found.here)
        self.mass = torch.zeros(len(sigma), count, dtype=torch.float64).index_put(at, found.chance, accumulate=True)
        self.factors = {name: slope * x for name, x in self.table.factors(sigma).items()}
        targets = self.table.targets(found.case, sigma[found.level])
        self.targets = {}
        for name in self.factors:
            each = targets[name] * found.chance.view(-1, *[1] * (targets[name].dim() - 1))
            shape = (len(sigma), count, *each.shape[1:])
            self.targets[name] = torch.zeros(shape, dtype=torch.float64).index_put(at, each, accumulate=True)
        self.rows = self.table.rows(torch.arange(count))

    def _possible(self, name: str) -> Tensor:
        """Positions at which an edit is possible, bool [s, w]: gaps for insertions, tokens for others."""
        where = self.rows.attend.clone()
        if self.table.kinds[name] > 0:
            where[:, 0] = False
        return where

    def _rates(self, outputs: Outputs) -> dict[str, Tensor]:
        levels, count = self.mass.shape
        many = Strings(self.rows.tokens.repeat(levels, 1), self.rows.attend.repeat(levels, 1))
        flat = {name: x.double().flatten(0, 1) for name, x in outputs.items()}
        rates = self.objective.rates(flat, many, self.table.clean)
        return {name: x.view(levels, count, *x.shape[1:]) for name, x in rates.items()}

    def _terms(self, name: str, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of one output, float64 [b, s, w, ...], for every edit: exp(u) and R u, times their factor."""
        rest = [1] * (u.dim() - 3)
        where = self._possible(name).view(1, *self._possible(name).shape, *rest)
        factor = self.factors[name].view(-1, 1, 1, *rest)
        total = torch.where(where, u, -1e9).exp() * self.mass.view(*self.mass.shape, 1, *rest)
        total = total * 0 if name in self.table.log_probabilities else total
        return factor * total, factor * self.targets[name] * torch.where(self.targets[name] > 0, u, 0.0)

    def loss(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the mean loss up to a constant, and the sum of the sizes of its terms, float64 [b] each."""
        value = size = torch.zeros(len(self.mass), dtype=torch.float64)
        for name, u in self._rates(outputs).items():
            total, linear = self._terms(name, u)
            value = value + (total - linear).flatten(1).sum(-1)
            size = size + (total + linear.abs()).flatten(1).sum(-1).detach()
        return value, size

    def scale(self, name: str, outputs: Outputs) -> Tensor:
        """Return the scale to which errors of the gradient in one output are relative, float64 [b, s, w, ...].

        The derivative of the loss in a log-rate u is p exp(u) - R, times the factor of the edit (:class:`Reference`).
        The scale is p exp(u) + R, times this factor. If rates are normalised over all edits of a string
        (``one_length``), the largest scale among these edits is added.

        Args:
            name: Name of the output.
            outputs: Outputs of the network by name, [b, s, w, ...].
        """
        u = self._rates(outputs)[name].detach()
        total, _ = self._terms(name, u)
        factor = self.factors[name].view(-1, *[1] * (u.dim() - 1))
        size = total + factor * self.targets[name]
        if self.objective.one_length:  # the rates are normalised over all edits of a string
            size = size + size.flatten(2).amax(-1).view(*size.shape[:2], *[1] * (u.dim() - 2))
        return size
