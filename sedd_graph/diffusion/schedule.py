"""The interface of noise schedules. Implementations are components.

Axes: b batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component

__all__ = ["Schedule"]


class Schedule(Component, ABC):
    """How noise grows with time."""

    abstract: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    """Whether it has parameters, which are trained (towards a loss that varies less) and kept with the network's. Total noise at
    t = 0 and 1 must not depend on them."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Total noise, float32 [b], increasing in t."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Its derivative in t, float32 [b]."""

    def time(self, sigma: Tensor) -> Tensor:
        """The time in [0, 1] at which total noise is ``sigma`` [b], by bisection; the nearer end where there is none."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(52 if sigma.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            above = self.sigma(middle) > sigma
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2
