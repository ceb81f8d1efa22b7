"""Probabilities that the network gave to the tokens of a sampling run, each when it was drawn.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.diffusion.draws import Where
from sedd_graph.diffusion.numerics import take

__all__ = ["Confidences"]


class Confidences:
    """The confidence of each token: its share of the weights that it was drawn with, before temperature and conditions.

    Under a kernel with carry-over unmasking, these weights are the network's distribution of the clean token; under
    others, the reverse step's distribution of the new token, given that the position changes. Computing them never waits for the device.

    Args:
        x: Initial rows, int64 [b, l].
        mask: The mask, which has no confidence; None if there is none.
        report: Called with the number of each step and the confidences, float32 [b, l]; NaN at tokens that were not
            drawn from the network (noise, given tokens, masks).
    """

    def __init__(self, x: Tensor, mask: int | None, report: Callable[[int, Tensor], None]) -> None:
        self._mask, self._report = mask, report
        self._tokens = torch.full_like(x, -1)
        self._values = torch.zeros(x.shape, device=x.device)
        self._weights = self._values

    def hold(self, weights: Tensor) -> None:
        """Hold the weights of the positions that are drawn next, [m, n], not normalised."""
        self._weights = weights

    def note(self, where: Where, tokens: Tensor) -> None:
        """Record the tokens that were drawn, int64 [m], by the weights that are held."""
        total = self._weights.sum(-1)
        share = torch.where(total > 0, take(self._weights, tokens) / total.clamp(min=1e-30), torch.nan)
        self._tokens[where.row, where.place] = tokens
        self._values[where.row, where.place] = share.to(self._values.dtype)

    def end_step(self, step: int, x: Tensor) -> None:
        """Report the confidences of the rows ``x``, int64 [b, l], after a step."""
        known = self._tokens == x
        if self._mask is not None:
            known = known & (x != self._mask)
        self._report(step, torch.where(known, self._values, torch.nan))
