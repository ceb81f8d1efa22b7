"""Kernels of vectors: learned embeddings with Gaussian noise.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.gaussian import noise_std, posterior
from sedd_graph.diffusion.vectors.kernel import VectorKernel, VectorKernelConfig

from ..network._shared import full_linear

__all__ = ["Gaussian"]


class Gaussian(VectorKernel, kind="vector_kernel"):
    """Learned embeddings with Gaussian noise in discrete time, rounded by a tied head (Diffusion-LM, arXiv 2205.14217).

    x_0 ~ N(embedding, sigma_0^2) and x_i = sqrt(alpha_bar_i) x_0 + sqrt(1 - alpha_bar_i) noise for the steps i = 1 to T, at
    times i / T of the schedule. The published code counts steps from 0: its step t is step t + 1 here. p(token | x_0) is
    the softmax of the product of x_0 and the embeddings, plus a learned bias.
    """

    learned = True
    example: ClassVar[Mapping[str, Any]] = {"vocab": 4, "width": 2}

    class Config(VectorKernelConfig):
        steps: Annotated[int, pydantic.Field(ge=2, le=1_000_000)] = 2000
        """Number T of steps of the process, from 2 to 1,000,000."""
        start: Annotated[float, pydantic.Field(ge=0, le=10)] | Literal["first_step"] = "first_step"
        """Standard deviation sigma_0 of x_0 around the embedding. ``first_step``: that of the noise of step 1, as in the
        published code."""
        variance: Literal["large", "small", "matched"] = "large"
        """Variance of a sampler's reverse step from x_t to x_s. ``large``: that of the forward step, 1 - alpha_bar_t /
        alpha_bar_s, as published; ``small``: that of q(x_s | x_t, x_0); ``matched``: that of q(x_s | x_t, token), which is the
        variance of the generative process that evaluation bounds."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.embedding = nn.Parameter(torch.randn(self.config.vocab, self.config.width))
        self.bias = nn.Parameter(torch.zeros(self.config.vocab))
        self._first: tuple[Schedule, float] | None = None

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        return config.model_copy(update={"vocab": states, "width": 1})

    @property
    def steps(self) -> int:
        return self.config.steps

    def table(self) -> Tensor:
        return self.embedding

    def logits(self, x0: Tensor) -> Tensor:
        return full_linear(x0, self.embedding, self.bias)

    def declared_start(self, schedule: Schedule) -> float:
        if self.config.start != "first_step":
            return float(self.config.start)
        if self._first is None or self._first[0] is not schedule or schedule.learned:
            first = torch.tensor([1 / self.steps], dtype=torch.float64, device=self.embedding.device)
            self._first = schedule, float(noise_std(self.sigma(schedule, first)))  # read once, which waits for a GPU
        return self._first[1]

    @torch.no_grad()
    def place(self, table: Tensor) -> None:
        self.embedding.copy_(table)
        self.bias.copy_(-table.square().sum(-1) / 2)

    def reverse_variance(self, lower: Tensor, sigma: Tensor, schedule: Schedule) -> Tensor:
        if self.config.variance == "matched":
            return super().reverse_variance(lower, sigma, schedule)
        if self.config.variance == "small":
            return posterior(lower, sigma).variance
        return -torch.expm1(lower - sigma)
