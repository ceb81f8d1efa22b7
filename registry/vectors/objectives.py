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
    the last step close to the prior, plus the cross-entropy of rounding x_0. It is not a bound.

    Evaluation reports an upper bound on -log p(tokens), nats, of the generative process x_T ~ N(0, 1), p(x_{i-1} | x_i) for i = T
    to 2, p(tokens | x_1): KL(q(x_T | tokens) || N(0, 1)), plus the sum over i of E[KL(q(x_{i-1} | x_i, tokens) || p(x_{i-1} |
    x_i))], plus E[-log p(tokens | x_1)]. p(x_{i-1} | x_i) has the mean of q(x_{i-1} | x_i, x_0) at the network's estimate of x_0,
    and the variance of q(x_{i-1} | x_i, tokens); p(tokens | x_1) rounds the estimate at x_1, which is what a sampler returns.
    A self-conditioned network is evaluated twice at each x_i, so that this process is a Markov chain.
    """

    reads = ("x0",)
    measure = "steps"
    unit = "squared error + nats"
    terms = frozenset({"mse", "last", "rounding"})

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
        return self._draw(batch, kernel, random, None, "low_discrepancy", first=2)

    def _draw(
        self, batch: Batch, kernel: VectorKernel, random: Randomness, t: Tensor | None, times: str, first: int = 1
    ) -> VectorDraw:
        """Draw steps from ``first`` to T, unless ``t`` [b] is given, and noise; the weight is the number of these steps."""
        rows, steps = len(batch), kernel.steps or 1
        count = steps - first + 1
        if t is None:
            u = random.low_discrepancy(rows) if times == "low_discrepancy" else random.rand(rows)
            step = (u.double() * count).long().clamp(max=count - 1) + first
        else:
            step = (t.double() * steps).round().long().clamp(first, steps)
        shape = (rows, *batch.tokens.shape[1:], kernel.width)
        start, noise = random.randn(*shape), random.randn(*shape)
        refined = random.systematic(rows, self.config.self_conditioning)
        return VectorDraw(step.double() / steps, start, noise, torch.full_like(start[:, 0, 0], count), refined)

    def optimal(self, start: Tensor, clean: Tensor, t: Tensor, kernel: VectorKernel) -> Tensor:
        # not by ``target``, which numerical verification compares with this
        return torch.where((t < 1.5 / (kernel.steps or 1))[:, None, None], clean, start)

    def loss(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        clean, x0, xt = self.vectors(draw, batch, kernel, schedule)
        found = denoise.refined(xt, draw.t, draw.refined, self.config.self_conditioning).x0
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
        sigma = kernel.sigma(schedule, draw.t)
        lower = kernel.sigma(schedule, draw.t - 1 / (kernel.steps or 1))
        true, model = posterior(lower, sigma, kernel.start_variance(schedule)), posterior(lower, sigma)
        each = kl(true.mean(clean, xt), true.variance, model.mean(found, xt), true.variance).sum(-1)
        return counted(draw.weight[:, None] * each + self.prior(clean, kernel, schedule), batch)

    @staticmethod
    def prior(clean: Tensor, kernel: VectorKernel, schedule: Schedule) -> Tensor:
        """Return KL(q(x_T | token) || N(0, 1)) of each position, nats, [b, l]."""
        end = kernel.sigma(schedule, torch.ones(1, dtype=torch.float64, device=clean.device))
        one = torch.ones_like(end)
        mean = along(signal(end), clean) * clean
        return kl(mean, spread(end, kernel.start_variance(schedule)), torch.zeros_like(mean), one).sum(-1)

    def reconstruction(
        self, denoise: Denoiser, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness
    ) -> Tensor:
        first = torch.full((len(batch),), 1 / (kernel.steps or 1), dtype=torch.float64, device=batch.tokens.device)
        draw = self.draw(batch, kernel, schedule, random=random, t=first)
        found = denoise.refined(self.vectors(draw, batch, kernel, schedule)[2], first).x0
        return counted(self.rounding(found, batch, kernel), batch)
