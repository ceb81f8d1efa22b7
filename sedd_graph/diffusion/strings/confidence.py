"""Probabilities that the network gave to the tokens of strings, each when it was drawn; they move with their tokens.

Axes: b rows, w positions (the BOS token first), v data tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import take

__all__ = ["StringConfidences"]


class StringConfidences:
    """The confidence of each token: its share of the weights that it was drawn with.

    Args:
        tokens: The initial strings, int64 [b, w].
        report: Called with the number of each step and the confidences, float32 [b, w]; NaN at tokens that were not
            drawn from the network (noise, given tokens, masks, padding).
    """

    def __init__(self, tokens: Tensor, report: Callable[[int, Tensor], None]) -> None:
        self._values = torch.full(tokens.shape, torch.nan, device=tokens.device)
        self._inserted: Tensor | None = None
        self._report = report

    def written(self, where: Tensor, weights: Tensor, tokens: Tensor) -> None:
        """Record the r tokens that replace those at ``where``, bool [b, w]; ``weights`` as [r, v], ``tokens`` int64 [r]."""
        self._values = self._with(self._values, where, weights, tokens)

    def inserting(self, where: Tensor, weights: Tensor, tokens: Tensor) -> None:
        """Record the r tokens that the next :meth:`moved` inserts, one behind each position of ``where``, bool [b, w]."""
        self._inserted = self._with(torch.full_like(self._values, torch.nan), where, weights, tokens)

    @staticmethod
    def _with(values: Tensor, where: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        share = take(weights, tokens) / weights.sum(-1).clamp(min=1e-30)
        values = values.clone()
        values[where] = share.to(values.dtype)
        return values

    def moved(self, origin: Tensor, attend: Tensor) -> None:
        """Record that tokens were deleted and inserted.

        Args:
            origin: Of each position, the position before that its token had; of an inserted token, w plus the position
                behind which it was inserted; int64 [b, new w].
            attend: bool [b, new w], False at padding.
        """
        inserted = torch.full_like(self._values, torch.nan) if self._inserted is None else self._inserted
        known = torch.cat([self._values, inserted], 1).gather(1, origin)
        self._values, self._inserted = known.masked_fill(~attend, torch.nan), None

    def end_step(self, step: int) -> None:
        """Report the confidences after a step."""
        self._report(step, self._values)
