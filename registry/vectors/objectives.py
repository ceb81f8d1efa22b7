"""Objectives of vectors: the end-to-end loss of Diffusion-LM, and its variational bound.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.gaussian import along, kl, posterior, signal, spread
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.diffusion.vectors.objective import VectorDraw, VectorObjective, counted

__all__ = ["DiffusionLM"]


class DiffusionLM(VectorObjective, kind="vector_objective"):
    """End-to-end loss of Diffusion-LM (arXiv 2205.14217, equation 2), for a network that predicts the clean vectors.

    The training loss of a position is the mean over the width of |x_0 - estimate|^2 at a random step (at step 1, against
    the embedding itself in place of x_0: the anchor), plus the mean over the width of |sqrt(alpha_bar_T) x_0|^2, which keeps
    the last step close to the prior, plus the cross-entropy of rounding x_0. It is not a bound. Evaluation reports the
    variational bound on -log p(tokens) of the chain tokens -> x_0 -> ... -> x_T: the sum over the steps of KL(q(x_{i-1} | x_i,
    tokens) || p(x_{i-1} | x_i)), plus KL(q(x_T | tokens) || N(0, 1)), plus E[-log p(tokens | x_0)]. A self-conditioned network
    is evaluated twice at each x_i, so that the bounded model is a Markov chain.
    """

    reads = ("x0",)

    class Config(ComponentConfig):
        self_conditioning: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
        """Share of the training rows whose network is conditioned on a first estimate (Analog Bits, arXiv 2208.04202), if
        the graph has the input ``estimate``; from 0 to 1."""
        times: Literal["independent", "low_discrepancy"] = "independent"
        """Distribution of the steps of a global batch. ``independent``: independent uniform steps, as published;
        ``low_discrepancy``: an even grid with one random offset (less variance, no bias). Evaluation of the bound takes
        the grid."""

    config: Config

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        if kernel.steps is None:
            return "a kernel in discrete time, such as gaussian"
        return "a schedule without trained parameters" if schedule.learned else None

    def draw(
        self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> VectorDraw:
        return self._draw(batch, kernel, random, t, self.config.times)

    def bound_draw(self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness) -> VectorDraw:
        return self._draw(batch, kernel, random, None, "low_discrepancy")

    def _draw(self, batch: Batch, kernel: VectorKernel, random: Randomness, t: Tensor | None, times: str) -> VectorDraw:
        rows, steps = len(batch), kernel.steps or 1
        if t is None:
            u = random.low_discrepancy(rows) if times == "low_discrepancy" else random.rand(rows)
            step = (u.double() * steps).long().clamp(max=steps - 1) + 1
        else:
            step = (t.double() * steps).round().long().clamp(1, steps)
        shape = (rows, *batch.tokens.shape[1:], kernel.width)
        start, noise = random.randn(*shape), random.randn(*shape)
        refined = random.rand(rows) < self.config.self_conditioning
        return VectorDraw(step.double() / steps, start, noise, torch.full_like(start[:, 0, 0], steps), refined)

    def loss(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        clean, x0, xt = self.vectors(draw, batch, kernel, schedule)
        found = denoise.refined(xt, draw.t, draw.refined).x0
        error = (self.target(clean, x0, draw.t, kernel) - found).square().mean(-1)
        return counted(error + self.last(x0, kernel, schedule) + self.rounding(x0, batch, kernel), batch)

    @staticmethod
    def target(clean: Tensor, x0: Tensor, t: Tensor, kernel: VectorKernel) -> Tensor:
        """Return the target of the estimate, [b, l, d]: x_0, but the embedding ``clean`` itself at step 1."""
        first = t * (kernel.steps or 1) < 1.5
        return torch.where(first[:, None, None], clean, x0)

    @staticmethod
    def last(x0: Tensor, kernel: VectorKernel, schedule: Schedule) -> Tensor:
        """Return the mean square of the mean of x_T given x_0, [b, l]."""
        end = torch.ones(1, dtype=torch.float64, device=x0.device)
        return (along(signal(kernel.sigma(schedule, end)), x0) * x0).square().mean(-1)

    @staticmethod
    def rounding(x0: Tensor, batch: Batch, kernel: VectorKernel) -> Tensor:
        """Return -log p(token | x_0) of each position, nats, [b, l]."""
        return F.cross_entropy(kernel.logits(x0).movedim(-1, 1), batch.tokens, reduction="none")

    def bound(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        clean, _, xt = self.vectors(draw, batch, kernel, schedule)
        found = denoise.refined(xt, draw.t).x0
        variance, first = kernel.start_variance(schedule), 1 / (kernel.steps or 1)
        sigma, lower = kernel.sigma(schedule, draw.t), kernel.sigma(schedule, draw.t - first)
        true, model = posterior(lower, sigma, variance), posterior(lower, sigma)
        chosen = kernel.step_variance(schedule, draw.t)
        each = kl(true.mean(clean, xt), true.variance, model.mean(found, xt), chosen).sum(-1)
        return counted(draw.weight[:, None] * each + self.prior(clean, kernel, schedule), batch)

    @staticmethod
    def prior(clean: Tensor, kernel: VectorKernel, schedule: Schedule) -> Tensor:
        """Return KL(q(x_T | token) || N(0, 1)) of each position, nats, [b, l]."""
        end = kernel.sigma(schedule, torch.ones(1, dtype=torch.float64, device=clean.device))
        one = torch.ones_like(end)
        mean = along(signal(end), clean) * clean
        return kl(mean, spread(end, kernel.start_variance(schedule)), torch.zeros_like(mean), one).sum(-1)

    def reconstruction(self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness) -> Tensor:
        noise = random.randn(*batch.tokens.shape, kernel.width)
        return counted(self.rounding(kernel.start(batch.tokens, schedule, noise), batch, kernel), batch)
