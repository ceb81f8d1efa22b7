"""Pseudorandom permutation of a range of integers that is computed for each integer, and needs no memory.

Imports no torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Bijection"]

ROUNDS = 8
"""Number of rounds of the network; four give a strong permutation for a random round function (Luby and Rackoff 1988)."""

Index = npt.NDArray[np.int64]
_U = np.uint64


class Bijection:
    """Pseudorandom permutation of the integers in [0, count), evaluated at given places.

    A balanced Feistel network permutes the integers of the smallest even number of bits that hold ``count - 1``. A value
    outside the range is permuted again until it lies within ("cycle walking", Black and Rogaway 2002), which takes fewer
    than four tries on average.

    Args:
        count: Number of integers.
        generator: Generator from which the keys of the rounds are drawn; they determine the permutation.
    """

    def __init__(self, count: int, generator: np.random.Generator) -> None:
        self.count = count
        self._half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
        self._keys = generator.integers(0, 2**64, size=ROUNDS, dtype=_U)

    def __call__(self, places: Index) -> Index:
        """Return the integers at ``places``, int64 [n], of the permutation: int64 [n]."""
        found = places.astype(_U)
        left = np.arange(len(found))
        while len(left):
            found[left] = self._network(found[left])
            left = left[found[left] >= self.count]
        return found.astype(np.int64)

    def _network(self, x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        mask = _U((1 << self._half) - 1)
        high, low = x >> _U(self._half), x & mask
        for key in self._keys:
            high, low = low, high ^ (_mixed(low ^ key) & mask)
        return (high << _U(self._half)) | low


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of each integer: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U(27))) * _U(0x94D049BB133111EB)
    return x ^ (x >> _U(31))
