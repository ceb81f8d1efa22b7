"""Rows and confidences after each sampler step, collected for a stored trajectory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["UNKNOWN", "Frames", "quantised"]

UNKNOWN = 255
"""Stored confidence of a token that was not drawn from the model; of others, 254 times the probability, rounded."""


def quantised(confidences: Tensor) -> Tensor:
    """Return confidences, float32 [b, l], as bytes, uint8 [b, l]; NaN becomes :data:`UNKNOWN`."""
    scaled = (confidences * 254).round().clamp(0, 254)
    return torch.where(confidences.isnan(), UNKNOWN, scaled.nan_to_num()).to(torch.uint8)


class Frames:
    """Arrays of each sampler step, in one array that is allocated once, since a stack of arrays would take twice the memory.

    Args:
        steps: Expected number of steps; None if unknown.
        dtype: Type of the collected values.
    """

    def __init__(self, steps: int | None, dtype: type[np.integer[Any]]) -> None:
        self._room, self._count, self._dtype = (steps or 0) + 1, 0, dtype
        self._made: npt.NDArray[Any] | None = None

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add the values after one step, [b, l]."""
        if self._made is None:
            self._made = np.empty((self._room, *rows.shape), dtype=self._dtype)
        elif self._count == len(self._made):
            self._made = np.concatenate([self._made, np.empty_like(self._made)])
        self._made[self._count] = rows
        self._count += 1

    def array(self) -> npt.NDArray[Any] | None:
        """Return all values, [step, b, l]; None if there are none."""
        return None if self._made is None else self._made[: self._count]
