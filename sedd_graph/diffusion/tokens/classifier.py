"""The interface of a classifier of noised rows, by which text is drawn towards a label. Implementations come in as components.

Axes: r rows, l length, n states, k labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import pydantic
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.guidance import Classifier
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["ClassifierConfig", "NoisyClassifier"]


class ClassifierConfig(ComponentConfig):
    """What text is drawn towards."""

    label: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    """The label, counted from 0."""
    strength: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """p(label | x) is raised to this power: 1 is Bayes' rule, 0 no guidance."""


class NoisyClassifier(Component, ABC):
    """p(label | x_t), of rows at any noise. Its Config extends :class:`ClassifierConfig`; its context has the axis ``n``."""

    abstract: ClassVar[bool] = True
    first_order: ClassVar[bool] = False
    """Whether :meth:`changes` is an approximation, such as a network's gradient times the change."""

    def lacks(self, kernel: Kernel) -> str | None:
        """What kind of kernel it needs, where ``kernel`` is not one of them."""
        return None

    @property
    @abstractmethod
    def labels(self) -> int:
        """How many labels there are."""

    @abstractmethod
    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(label | x_t), nats, float32 [r, k], of rows int64 [r, l] at total noise ``sigma`` [r]."""

    def changes(self, x: Tensor, sigma: Tensor, label: int) -> Tensor | None:
        """log p(label | x with state y at i) - log p(label | x), float32 [r, l, n], where there is a quicker way than to ask
        :meth:`log_prob` about each."""
        return None

    def guide(self, schedule: Schedule) -> Classifier:
        """As samplers take it."""
        label, strength = self.config.label, self.config.strength
        return Classifier(
            lambda x, t: self.log_prob(x, schedule.sigma(t))[:, label],
            strength=strength,
            changes=lambda x, t: self.changes(x, schedule.sigma(t), label),
        )
