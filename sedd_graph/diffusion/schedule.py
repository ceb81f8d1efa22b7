"""The interface of noise schedules: total noise as a function of time. Implementations are components.

Axes: b batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component

__all__ = ["FittedSchedule", "Schedule"]


class Schedule(Component, ABC):
    """A noise schedule: total noise sigma(t), increasing in t, from clean data at t = 0 to noise at t = 1."""

    abstract: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    """True if the schedule has trained parameters.

    They are trained to reduce the variance of the loss, and saved with the network's. Total noise at t = 0 and at t = 1
    must not depend on them, except in a :class:`FittedSchedule`.
    """

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return total noise at times ``t``.

        Args:
            t: Times in [0, 1], [b].

        Returns:
            float32 [b]; float64 if ``t`` is float64.
        """

    @abstractmethod
    def dsigma(self, t: Tensor) -> Tensor:
        """Return the derivative of total noise with respect to time.

        Args:
            t: Times in [0, 1], [b].

        Returns:
            float32 [b]; float64 if ``t`` is float64.
        """

    def time(self, sigma: Tensor) -> Tensor:
        """Return the times at which total noise is ``sigma``: the inverse of :meth:`sigma`.

        The default bisects, which launches some hundred small kernels; a schedule with a closed form overrides it.

        Args:
            sigma: Total noise, [b].

        Returns:
            Times in [0, 1], [b]; 0 or 1 where ``sigma`` is outside the schedule's range.
        """
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(52 if sigma.dtype == torch.float64 else 30):
            middle = (low + high) / 2
            above = self.sigma(middle) > sigma
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2


class FittedSchedule(Schedule):
    """A schedule whose trained parameters are fitted to the cross-entropy of the tokens as a function of total noise.

    Objectives of vectors add :meth:`fit` to their loss. :meth:`sigma` and :meth:`dsigma` have no gradients to the parameters.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def fit(self, sigma: Tensor, nats: Tensor) -> Tensor:
        """Return the loss of the parameters for measured cross-entropies, float64 [b], with gradients to them alone.

        Args:
            sigma: Total noise, [b].
            nats: Cross-entropy of the clean tokens given rows at this noise, nats per token, [b].
        """
