"""Total variation distance between the frequencies of random draws and a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["total_variation"]


def total_variation(draws: Tensor, law: Tensor) -> float:
    """Return the total variation distance: half the l1 distance between the frequencies of draws and a distribution.

    Args:
        draws: State index of each of r draws, int64 [r]. Indices from s on count as draws but are in none of the s
            states.
        law: Probabilities of the states, float64 [s].
    """
    found = torch.bincount(draws, minlength=len(law))[: len(law)].double() / len(draws)
    return float((found - law).abs().sum() / 2)
