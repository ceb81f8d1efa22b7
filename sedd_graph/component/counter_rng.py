"""Counter-based random numbers for networks: the draws of a node are a function of one key per row.

A key is an int32 for each row of a batch, derived from (seed, step, global row); each region and node folds its index into it.
Draws are therefore equal however rows are split over processes or accumulation, after a resume, and when a branch is evaluated
again in the backward pass; torch's global generators are not used. The integer hash (the finaliser of MurmurHash3) also
compiles to far fewer operations than a stateful generator.

Axes: b batch.
"""

import math

import torch
from torch import Tensor

__all__ = ["dropout", "fold", "hashed"]

_M1, _M2, _GOLDEN = -2048144789, -1028477387, -1640531527  # 0x85ebca6b, 0xc2b2ae35, 0x9e3779b9 as int32


def hashed(h: Tensor) -> Tensor:
    """Hash int32 values elementwise by the finaliser of MurmurHash3, a bijection in which each input bit affects all output bits."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _M1
    h = (h ^ ((h >> 13) & 0x7FFFF)) * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def fold(key: Tensor, place: int) -> Tensor:
    """Return the key, int32 [b], of child number ``place`` of the region with the key ``key``, int32 [b].

    It is only a multiplication and an addition, since the compiler inlines it for every node; :func:`dropout` hashes.
    """
    return key * _M1 + murmur(place + 1)


def murmur(h: int) -> int:
    """Return :func:`hashed` of one integer, as the value of an int32."""
    h %= 2**32
    h = (h ^ (h >> 16)) * (_M1 % 2**32) % 2**32
    h = (h ^ (h >> 13)) * (_M2 % 2**32) % 2**32
    h ^= h >> 16
    return h - 2**32 * (h >= 2**31)


def dropout(x: Tensor, p: float, key: Tensor) -> Tensor:
    """Set each entry of ``x`` [b, ...] to zero with probability ``p`` and divide the others by ``1 - p``.

    Args:
        x: Values, two or more axes.
        p: Probability, in [0, 1).
        key: Keys of the rows, int32 [b].
    """
    inner = torch.arange(math.prod(x.shape[1:-1]), dtype=torch.int32, device=x.device)
    rows = hashed(key[:, None] + inner * _GOLDEN)
    columns = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * _GOLDEN
    h = (rows.view(*x.shape[:-1], 1) ^ columns) * _M1
    h = (h ^ (h >> 15)) * _M2
    return torch.where(h >= round(p * 2**32) - 2**31, x * (1 / (1 - p)), 0.0)
