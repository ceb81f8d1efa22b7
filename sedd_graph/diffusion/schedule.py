"""The interface of noise schedules: total noise as a function of time. Implementations are components.

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
    """Total noise sigma(t), increasing in t from t = 0 (clean) to t = 1 (noise)."""

    abstract: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    """True if the schedule has parameters. They are trained to reduce the variance of the loss, and saved with the network's.
    Total noise at t = 0 and at t = 1 must not depend on them."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return total noise at times ``t`` [b], float32 [b] (float64 for a float64 ``t``)."""

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Return the derivative of total noise at times ``t`` [b], float32 [b] (float64 for a float64 ``t``)."""

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times in [0, 1] at which total noise is ``sigma`` [b], by bisection; 0 or 1 for noise out of range."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(52 if sigma.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            above = self.sigma(middle) > sigma
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2
