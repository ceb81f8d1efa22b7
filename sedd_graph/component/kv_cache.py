"""KV cache of one attention component for block-by-block generation.

A position is finished when its token is final, so that its key and value no longer change. The current positions are
those of the present forward pass; they follow the finished ones.

Axes: b rows, h heads, l current positions, r size of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Cache of the keys and values of finished positions (those whose tokens are final), for one attention component.

    In each forward pass, the attention component computes keys and values of the current positions (those that the pass
    evaluates), with position encoding applied, and calls the cache with them. The call returns the keys and values of
    the finished positions followed by the current ones, to which the component attends. After a pass over final tokens,
    the generation loop calls :meth:`keep`, which makes the current positions finished ones.

    The first call allocates the cache, with the dtype, device, heads and head size of its arguments.

    Args:
        rows: Number of rows of the batch.
        capacity: Largest number of positions per row, finished and current together.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows: Tensor | None = None
        """Indices of the batch rows that the next call has keys and values of, int64 [b]; None for all rows."""
        self._buffers: tuple[Tensor, ...] = ()
        self._size = (rows, capacity)
        self._finished = self._filled = 0

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend the cached keys and values to those of the current positions (the positions of this forward pass).

        Args:
            k: Keys of the l current positions, [b, h, l, r], for b rows, h heads and head size r.
            v: Values of the current positions, [b, h, l, r].

        Returns:
            Keys and values, [b, h, f + l, r] each: those of the f finished positions, then those of the current ones.
        """
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
        """Mark the positions of the last call as finished, so that later calls return their keys and values, too.

        The last call must have been for all rows of the batch: the attribute :attr:`rows`, which selects a subset, was
        None. The keys and values of a call for a subset are not stored.
        """
        self._finished = self._filled
