"""The interface of classifiers of noisy rows, for guiding samples towards a label. Implementations are components.

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
    """Config of a classifier: the target label and the guidance strength."""

    label: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    """The label that samples are guided towards, counted from 0."""
    strength: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Exponent of p(label | x) in guidance, from 0 to 100. 1: Bayes' rule; 0: no guidance."""


class NoisyClassifier(Component, ABC):
    """A classifier p(label | x_t) of noisy rows at any noise level.

    The Config of a subclass extends :class:`ClassifierConfig`. A subclass obtains the number of states n from
    ``self.axis("n")``.
    """

    abstract: ClassVar[bool] = True
    first_order: ClassVar[bool] = False
    """True if :meth:`changes` is a first-order approximation, such as gradient times difference of one-hot vectors."""
    config: ClassifierConfig

    def lacks(self, kernel: Kernel) -> str | None:
        """Return a description of the kind of kernel that the classifier requires; None if ``kernel`` is suitable."""
        return None

    @property
    @abstractmethod
    def labels(self) -> int:
        """Number of labels, k."""

    @abstractmethod
    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the log-probability of each label given noisy rows, log p(label | x_t).

        Args:
            x: Noisy rows x_t, int64 [r, l].
            sigma: Total noise, [r].

        Returns:
            Nats, float32 [r, k].
        """

    def changes(self, x: Tensor, sigma: Tensor, label: int) -> Tensor | None:
        """Return the change in the label's log-probability for every substitution of one token.

        Entry (i, y) of a row is log p(label | x with state y at position i) - log p(label | x).

        Args:
            x: Noisy rows, int64 [r, l].
            sigma: Total noise, [r].
            label: The label, counted from 0.

        Returns:
            Nats, float32 [r, l, n]; or None (the default), and guidance then evaluates :meth:`log_prob` on each
            substituted row.
        """
        return None

    def guide(self, schedule: Schedule) -> Classifier:
        """Return a :class:`Classifier` for guided sampling, with the configured label and strength.

        Args:
            schedule: Converts times to total noise.
        """
        label, strength = self.config.label, self.config.strength
        return Classifier(
            lambda x, t: self.log_prob(x, schedule.sigma(t))[:, label],
            strength=strength,
            changes=lambda x, t: self.changes(x, schedule.sigma(t), label),
        )
