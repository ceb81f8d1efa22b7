"""The interface of the base density of a normalizing flow. Implementations are components.

Axes: b batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sedd_graph.component.base import Component

__all__ = ["Likelihood"]


class Likelihood(Component, ABC):
    """The base density of a normalizing flow that is trained by exact maximum likelihood.

    By the change of variables, ``-log p(x) = -log base(z) - log |det dz/dx|``, where z is the output of the flow for
    data x.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def nats(self, z: Tensor) -> Tensor:
        """Return the negative log of the base density at each row.

        Args:
            z: Outputs of the flow, [b, ...].

        Returns:
            Nats, [b].
        """

    @abstractmethod
    def draw(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        """Draw samples from the base density.

        Args:
            shape: Shape of the result, rows first.
            generator: Random number generator; the result is on its device.

        Returns:
            float32 of ``shape``.
        """
