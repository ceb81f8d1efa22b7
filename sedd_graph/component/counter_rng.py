"""Counter-based randomness for networks: what a node draws is a function of a key per row, and of nothing else.

A key is one int32 for each row of a batch, made from (seed, step, global row); each node on the way down folds its own
place into it. So a step draws the same however its rows are split over processes or accumulation, after a resume, and
when a branch is evaluated a second time in the backward pass; torch's global generators are not touched. The integer
hash (murmur3's finaliser) also compiles to far less than a generator's state machine does.

Axes: b batch.
"""

import math

import torch
from torch import Tensor

__all__ = ["dropout", "fold", "hashed"]

_M1, _M2, _GOLDEN = -2048144789, -1028477387, -1640531527  # 0x85ebca6b, 0xc2b2ae35, 0x9e3779b9 as int32


def hashed(h: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the input moves every bit of the output (murmur3's finaliser)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _M1
    h = (h ^ ((h >> 13) & 0x7FFFF)) * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def fold(key: Tensor, place: int) -> Tensor:
    """The key, int32 [b], of the node at ``place`` below the one that ``key`` belongs to.

    Only a multiplication and an addition, since compilers write it out for every node; :func:`dropout` hashes.
    """
    return key * _M1 + murmur(place + 1)


def murmur(h: int) -> int:
    """:func:`hashed` of one integer, as an int32's value."""
    h %= 2**32
    h = (h ^ (h >> 16)) * (_M1 % 2**32) % 2**32
    h = (h ^ (h >> 13)) * (_M2 % 2**32) % 2**32
    h ^= h >> 16
    return h - 2**32 * (h >= 2**31)


def dropout(x: Tensor, p: float, key: Tensor) -> Tensor:
    """``x`` [b, ...] with each entry set to zero with chance ``p`` and the rest divided by ``1 - p``."""
    inner = torch.arange(math.prod(x.shape[1:-1]), dtype=torch.int32, device=x.device)
    rows = hashed(key[:, None] + inner * _GOLDEN)
    columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * _GOLDEN
    h = (rows.view(*x.shape[:-1], 1) ^ columns) * _M1
    h = (h ^ (h >> 15)) * _M2
    return torch.where(h >= round(p * 2**32) - 2**31, x * (1 / (1 - p)), 0.0)
