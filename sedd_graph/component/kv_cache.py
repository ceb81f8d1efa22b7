"""The KV cache of finished positions, for text that is generated block by block.

Axes: b rows, h heads, l positions, r width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Memory"]


class Memory:
    """Keys and values of finished positions, for one attention component.

    The component calls it with its own keys and values, position encoding applied, and attends to what is returned: those of
    finished positions before its own. The engine calls :meth:`keep` once the positions of the last call are finished.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows: Tensor | None = None
        """Rows that the next call is for, int64 [b]; None for all."""
        self._held: tuple[Tensor, ...] = ()
        self._size = (rows, capacity)
        self._kept = self._filled = 0

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``k`` and ``v`` [b, h, l, r] with the finished positions before them, [b, h, finished + l, r]."""
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
        """Mark the positions of the last call as finished."""
        self._kept = self._filled
