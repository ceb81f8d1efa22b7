"""The interface of the base density of a flow. Implementations are components.

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
    """The base density of a flow, which is trained by exact maximum likelihood.

    By the change of variables ``-log p(x) = -log base(z) - log |det dz/dx|``, where z is the output of the flow.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def nats(self, z: Tensor) -> Tensor:
        """Return -log of the base density of each row of ``z`` [b, ...], nats, [b]."""

    @abstractmethod
    def draw(self, shape: Sequence[int], *, generator: torch.Generator) -> Tensor:
        """Draw rows from the base density, float32 of ``shape``."""
