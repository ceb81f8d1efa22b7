"""The KV cache: keys and values of finished positions, while text is generated block by block.

Axes: b rows, h heads, l positions, r width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of finished positions, for one attention component.

    The component calls it with the keys and values of the current positions, position encoding applied, and attends to those
    that it returns. The engine calls :meth:`keep` when the positions of the last call are finished.

    Args:
        rows: Rows of the batch.
        capacity: Largest number of positions.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows: Tensor | None = None
        """Rows that the next call is for, int64 [b]; None for all."""
        self._buffers: tuple[Tensor, ...] = ()
        self._size = (rows, capacity)
        self._finished = self._filled = 0

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``k`` and ``v`` [b, h, l, r] preceded by those of the finished positions, [b, h, finished + l, r]."""
        self._filled = self._finished + k.shape[2]
        if not self._buffers:
            rows, capacity = self._size
            self._buffers = tuple(t.new_empty(rows, t.shape[1], capacity, t.shape[3]) for t in (k, v))
        joined = []
        for buffer, current in zip(self._buffers, (k, v), strict=True):
            if self.rows is None:
                buffer[:, :, self._finished : self._filled] = current
                joined.append(buffer[:, :, : self._filled])
            else:
                joined.append(torch.cat([buffer[self.rows, :, : self._finished], current], dim=2))
        return joined[0], joined[1]

    def keep(self) -> None:
        """Mark the positions of the last call as finished."""
        self._finished = self._filled
