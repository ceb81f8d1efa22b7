"""What attention remembers of text that is finished, so that it need not be looked at again.

Axes: b rows, h heads, l positions, r width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Memory"]


class Memory:
    """Keys and values of finished positions, for one component that lets positions look at each other.

    The component calls it with those of the positions it is given, once it has turned them by where they stand, and goes on
    with what comes back: the finished ones in front of its own. Whoever gave it out says in between what is finished.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows: Tensor | None = None
        """int64 [b]: which rows the next call is about; None for all."""
        self._held: tuple[Tensor, ...] = ()
        self._size = (rows, capacity)
        self._kept = self._filled = 0

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``k`` and ``v`` [b, h, l, r] as [b, h, finished + l, r]."""
        self._filled = self._kept + k.shape[2]
        if not self._held:
            rows, capacity = self._size
            self._held = tuple(t.new_empty(rows, t.shape[1], capacity, t.shape[3]) for t in (k, v))
        seen = []
        for held, own in zip(self._held, (k, v), strict=True):
            if self.rows is None:
                held[:, :, self._kept : self._filled] = own
                seen.append(held[:, :, : self._filled])
            else:
                seen.append(torch.cat([held[self.rows, :, : self._kept], own], dim=2))
        return seen[0], seen[1]

    def keep(self) -> None:
        """What it was last called with is finished."""
        self._kept = self._filled
