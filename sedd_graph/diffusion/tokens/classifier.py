"""The interface of classifiers of noisy rows, which guide samples towards a label. Implementations are components.

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
    """Config of a classifier: the label and the strength of guidance."""

    label: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    """The label that samples are guided towards, counted from 0."""
    strength: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Power of p(label | x), from 0 to 100. 1: Bayes' rule; 0: no guidance."""


class NoisyClassifier(Component, ABC):
    """p(label | x_t) of rows at any noise level. Its Config extends :class:`ClassifierConfig`; its context has the axis ``n``."""

    abstract: ClassVar[bool] = True
    first_order: ClassVar[bool] = False
    """True if :meth:`changes` is a first-order approximation, such as a gradient times a difference of one-hot rows."""
    config: ClassifierConfig

    def lacks(self, kernel: Kernel) -> str | None:
        """Return the kind of kernel that the classifier needs, in words; None if ``kernel`` is suitable."""
        return None

    @property
    @abstractmethod
    def labels(self) -> int:
        """Number of labels, k."""

    @abstractmethod
    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return log p(label | x_t), nats, float32 [r, k], of rows ``x`` int64 [r, l] at total noise ``sigma`` [r]."""

    def changes(self, x: Tensor, sigma: Tensor, label: int) -> Tensor | None:
        """Return log p(label | x with state y at position i) - log p(label | x), nats, float32 [r, l, n].

        None (the default): guidance evaluates :meth:`log_prob` for each change.
        """
        return None

    def guide(self, schedule: Schedule) -> Classifier:
        """Return the classifier of the configured label in the form that sampling takes."""
        label, strength = self.config.label, self.config.strength
        return Classifier(
            lambda x, t: self.log_prob(x, schedule.sigma(t))[:, label],
            strength=strength,
            changes=lambda x, t: self.changes(x, schedule.sigma(t), label),
        )
