"""Counter-based random numbers for dropout: the random numbers of a node are a function of one key per row.

A key is an int32 per row of a batch, derived from (seed, step, index of the row in the global batch). Each subgraph and
node folds its index into the key (:func:`fold`). The random numbers are therefore the same for every split of the batch
over processes or accumulation steps, after a resume, and when a branch is recomputed in the backward pass. The global
generators of torch are not used. The integer hash (the finaliser of MurmurHash3) compiles to far fewer operations than
a stateful generator.

Products and sums are computed in int64, where they do not overflow, and wrapped to int32. Overflow of int32 is undefined in
the C++ code that Inductor writes: GCC drops loop bounds that it contradicts, and the kernel reads past its arrays.

Axes: b batch.
"""

import math

import torch
from torch import Tensor

__all__ = ["dropout", "fold", "hashed"]

_M1, _M2, _GOLDEN = -2048144789, -1028477387, -1640531527  # 0x85ebca6b, 0xc2b2ae35, 0x9e3779b9 as int32


def hashed(h: Tensor) -> Tensor:
    """Return the MurmurHash3 finaliser of each element of ``h``, int32 of any shape.

    The hash is a bijection of int32 in which each input bit affects all output bits.
    """
    h = _product(h ^ ((h >> 16) & 0xFFFF), _M1)
    h = _product(h ^ ((h >> 13) & 0x7FFFF), _M2)
    return h ^ ((h >> 16) & 0xFFFF)


def fold(key: Tensor, place: int) -> Tensor:
    """Derive the keys of one child (node or subgraph) from the keys of the subgraph that contains the child.

    The operation is only a multiplication and an addition, since the compiler inlines it for every node;
    :func:`dropout` hashes the result.

    Args:
        key: Keys of the subgraph, int32 [b].
        place: Index of the child in the subgraph, from 0.

    Returns:
        Keys of the child, int32 [b].
    """
    return (key.long() * _M1 + murmur(place + 1)).int()


def murmur(h: int) -> int:
    """Return the MurmurHash3 finaliser of a Python integer, equal to :func:`hashed` of the int32 with the same bits."""
    h %= 2**32
    h = (h ^ (h >> 16)) * (_M1 % 2**32) % 2**32
    h = (h ^ (h >> 13)) * (_M2 % 2**32) % 2**32
    h ^= h >> 16
    return h - 2**32 * (h >= 2**31)


def dropout(x: Tensor, p: float, key: Tensor) -> Tensor:
    """Apply dropout: set each element of ``x`` to zero with probability ``p`` and divide the others by ``1 - p``.

    Args:
        x: Values, float [b, ...] (b batch) with two or more axes.
        p: Probability that an element is set to zero, in [0, 1).
        key: One key per batch row, int32 [b]. The dropout mask is a function of the row's key and of the indices of the
            element within the row.

    Returns:
        The result, with the shape of ``x``.
    """
    rows = hashed((key[:, None] + _counters(math.prod(x.shape[1:-1]), x.device)).int())
    h = _product(rows.view(*x.shape[:-1], 1) ^ _counters(x.shape[-1], x.device).int(), _M1)
    h = _product(h ^ (h >> 15), _M2)
    return torch.where(h >= round(p * 2**32) - 2**31, x * (1 / (1 - p)), 0.0)


def _product(h: Tensor, factor: int) -> Tensor:
    """Return ``h * factor`` modulo 2**32 as int32, for int32 ``h`` and factor."""
    return (h.long() * factor).int()


def _counters(count: int, device: torch.device) -> Tensor:
    """Return ``_GOLDEN`` times 0, 1, ..., ``count`` - 1, int64 [count].

    The bitwise operation keeps Inductor from turning the product into an index, whose steps it multiplies as int32.
    """
    return (torch.arange(count, device=device) & 0x7FFFFFFF) * _GOLDEN
