"""Total variation distance between draws and the distribution that they should have."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["total_variation"]


def total_variation(draws: Tensor, law: Tensor) -> float:
    """Return half the l1 distance between the frequencies of draws and a distribution.

    Args:
        draws: int64 [r], the state of each draw. States from s on are outside the distribution.
        law: float64 [s], probabilities.
    """
    found = torch.bincount(draws, minlength=len(law))[: len(law)].double() / len(draws)
    return float((found - law).abs().sum() / 2)
