"""The interface of classifiers of noisy vectors, for guiding samples by gradients. Implementations are components.

Axes: r rows, l length, d width of a vector, k labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.diffusion.vectors.kernel import VectorKernel

__all__ = ["VectorClassifier", "VectorClassifierConfig"]


class VectorClassifierConfig(ComponentConfig):
    """Config of a classifier of noisy vectors: the target label, and how its gradient changes the samples."""

    label: Annotated[int, pydantic.Field(ge=0, lt=2**31)]
    """The label that samples are guided towards, counted from 0."""
    strength: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Exponent of p(label | x_t) in guidance, from 0 to 100. 1: Bayes' rule; 0: no guidance."""
    updates: Annotated[int, pydantic.Field(ge=0, le=100)] = 0
    """Number of Adagrad updates of x_{t-1} after each step, from 0 to 100, as in Diffusion-LM (arXiv 2205.14217, section
    5.1; 3 there). 0: the gradient is added to the score instead (arXiv 2105.05233)."""
    rate: Annotated[float, pydantic.Field(gt=0, le=100)] = 0.1
    """Learning rate of the updates."""
    fluency: Annotated[float, pydantic.Field(ge=0, le=100)] = 0.01
    """Weight of log p(x_{t-1} | x_t) in the updates, from 0 to 100, which keeps samples fluent."""


class VectorClassifier(Component, ABC):
    """A classifier p(label | x_t) of noisy vectors at any noise level, differentiable in x_t.

    The Config of a subclass extends :class:`VectorClassifierConfig`. The number of tokens is ``self.axis("n")``.
    """

    abstract: ClassVar[bool] = True
    config: VectorClassifierConfig

    @property
    @abstractmethod
    def labels(self) -> int:
        """Number of labels, k."""

    @abstractmethod
    def log_prob(self, x: Tensor, sigma: Tensor, kernel: VectorKernel, start_variance: float) -> Tensor:
        """Return the log-probability of each label given noisy vectors, log p(label | x_t), nats, [r, k].

        Args:
            x: Noisy vectors x_t, [r, l, d].
            sigma: Total noise, float64 [r].
            kernel: The kernel, whose embeddings the vectors are of.
            start_variance: Variance of x_0 around the embeddings.
        """

    def gradient(self, x: Tensor, sigma: Tensor, kernel: VectorKernel, start_variance: float) -> Tensor:
        """Return ``strength`` times the gradient of log p(label | x_t) in x_t, [r, l, d]; arguments as :meth:`log_prob`."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.log_prob(x, sigma, kernel, start_variance)[:, self.config.label].sum()
            (found,) = torch.autograd.grad(value, x)
        return self.config.strength * found

    def updated(
        self, x: Tensor, mean: Tensor, variance: Tensor, sigma: Tensor, kernel: Any, start_variance: float
    ) -> Tensor:
        """Return x_{t-1} after the Adagrad updates of Diffusion-LM, [r, l, d].

        The updates ascend ``strength * log p(label | x) + fluency * log N(x; mean, variance)``.

        Args:
            x: x_{t-1} as it was drawn, [r, l, d].
            mean: Mean of the reverse step, [r, l, d].
            variance: Variance of the reverse step, float64 [r], above 0.
            sigma: Total noise of x_{t-1}, float64 [r].
            kernel: The kernel.
            start_variance: Variance of x_0 around the embeddings.
        """
        total = torch.zeros_like(x)
        scale = (self.config.fluency / variance).to(x.dtype)[:, None, None]
        for _ in range(self.config.updates):
            step = self.gradient(x, sigma, kernel, start_variance) - scale * (x - mean)
            total = total + step.square()
            x = x + self.config.rate * step / (total.sqrt() + 1e-10)
        return x
