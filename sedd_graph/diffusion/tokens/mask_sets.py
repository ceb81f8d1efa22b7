"""Sets of masked positions with which the bound of one row is estimated in a few evaluations of the network.

The bound of a masking kernel is a mean over the number k of masks, evenly from 1 to n, and over all sets of k of the n
positions (arXiv 2406.03736, eq. 3.6). The sets of a row are drawn together: their sizes are stratified, and they cover the
positions evenly, since a set begins where the one before ends in a random order of the positions: two sets of n positions
together are complements. Each set by itself is uniform among those of its size, so the estimate has no bias.

Axes: l length, s sets, k blocks of a row.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["MaskSets", "exact_sets", "mask_sets"]

Mask = npt.NDArray[np.bool_]


class MaskSets(NamedTuple):
    """Sets of masked positions of one row.

    Attributes:
        masks: bool [s, l].
        factors: Weight of each set, and block, beside the weight n / k that the objective gives it, float64 [s, k]. The
            mean over sets of the weighted losses is the estimate.
    """

    masks: Mask
    factors: npt.NDArray[np.float64]


def exact_sets(free: Mask) -> int:
    """Return the number of sets that make the estimate of a row exact: all but the empty one.

    Args:
        free: bool [l], positions that may be masked.
    """
    return int(2 ** min(int(free.sum()), 62) - 1)


def mask_sets(free: Mask, count: int, *, block: int, generator: np.random.Generator) -> MaskSets:
    """Draw sets of masked positions for one row.

    Args:
        free: bool [l], positions that may be masked.
        count: Number of sets, s. If it suffices for all sets of a block, these are returned, and empty sets of weight 0.
        block: Positions per block, which divides l; blocks are masked independently.
        generator: Source of random numbers.
    """
    masks = np.zeros((count, len(free)), np.bool_)
    factors = np.zeros((count, len(free) // block))
    for number in range(len(free) // block):
        places = np.flatnonzero(free[number * block : (number + 1) * block]) + number * block
        if not len(places):
            continue
        if exact_sets(free[number * block : (number + 1) * block]) <= count:
            rows = (
                (size, subset) for size in range(1, len(places) + 1) for subset in itertools.combinations(places, size)
            )
            for at, (size, subset) in enumerate(rows):
                masks[at, list(subset)] = True
                factors[at, number] = count / (len(places) * math.comb(len(places), size))
        else:
            levels = (generator.random(count) + np.arange(count)) / count
            sizes = np.minimum(1 + (levels * len(places)).astype(np.int64), len(places))
            order, start = generator.permutation(places), 0
            for at, size in enumerate(sizes.tolist()):
                masks[at, order[(start + np.arange(size)) % len(places)]] = True
                start += size
            factors[:, number] = 1.0
    return MaskSets(masks, factors)
