"""Objective of LangFlow: cross-entropy of the tokens given noisy vectors, and its likelihoods.

Axes: b batch, l length, d width of a vector, v tokens.
"""

from typing import Annotated

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import FittedSchedule, Schedule
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.diffusion.vectors.objective import VectorDraw, counted

from ._bound import draw_times, each_position, importance
from ._flow_objective import FlowObjective

__all__ = ["LangFlow"]


class LangFlow(FlowObjective, kind="vector_objective"):
    """Cross-entropy of the tokens given noisy vectors (LangFlow, arXiv 2604.11748), for a network that predicts logits.

    Times are uniform, so noise levels are drawn as the schedule distributes them; a ``gumbel`` schedule is fitted to the
    cross-entropy along the way. Cross-entropy is a Bregman divergence, so its minimum is the posterior of the tokens, and
    the mean embedding under it is E[x_0 | x_t]. The training loss is not a bound.

    Evaluation reports an upper bound on -log p(tokens) of the process in continuous time: the integral of snr / 2 |x_0 -
    estimate|^2 over gamma = -log snr, plus KL(q(x_1 | tokens) || N(0, 1)), plus E[-log p(tokens | x_t)] at the lowest noise (VDM,
    arXiv 2107.00630). ``eval --likelihood ode`` reports the bound of the probability-flow ODE, integrated in a finite number of steps.
    """

    reads = ("logits",)
    measure = "time"
    terms = frozenset({"cross_entropy"})

    class Config(FlowObjective.Config):
        self_conditioning: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.25
        """Share of the training rows whose network is conditioned on a first estimate, if the graph has the input
        ``estimate``; from 0 to 1."""

    config: Config

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        if kernel.steps is not None or kernel.start_variance(schedule) > 0:
            return "a kernel in continuous time whose x_0 is the embedding, such as normalized_gaussian"
        if schedule.learned and not isinstance(schedule, FittedSchedule):
            return "a schedule without trained parameters, or one that is fitted to the cross-entropy, such as gumbel"
        return None

    def draw(
        self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> VectorDraw:
        return self._draw(batch, kernel, schedule, random, t, self.config.times)

    def bound_draw(self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness) -> VectorDraw:
        return self._draw(batch, kernel, schedule, random, None, "low_discrepancy")

    def _draw(
        self,
        batch: Batch,
        kernel: VectorKernel,
        schedule: Schedule,
        random: Randomness,
        t: Tensor | None,
        times: str,
    ) -> VectorDraw:
        rows = len(batch)
        t = draw_times(rows, schedule, times, random, t)
        noise = random.randn(rows, *batch.tokens.shape[1:], kernel.width)
        refined = random.systematic(rows, self.config.self_conditioning)
        return VectorDraw(t, torch.zeros_like(noise), noise, importance(t, kernel, schedule), refined)

    def loss(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        xt = self.vectors(draw, batch, kernel, schedule)[2]
        logits = denoise.refined(xt, draw.t, draw.refined, self.config.self_conditioning).logits
        nats = counted(cross_entropy(logits, batch.tokens), batch)
        if isinstance(schedule, FittedSchedule):
            count = batch.counted.clamp(min=1)
            fit = count * schedule.fit(kernel.sigma(schedule, draw.t), nats / count)
            fit = torch.where(batch.counted > 0, fit, 0.0)
            nats = nats + (fit - fit.detach()).to(nats.dtype)  # the gradient of the fit, without its value
        return nats

    def bound(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        clean, _, xt = self.vectors(draw, batch, kernel, schedule)
        found = denoise.refined(xt, draw.t).x0
        return counted(each_position(clean, found, draw.weight, kernel, schedule), batch)

    def reconstruction(
        self, denoise: Denoiser, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness
    ) -> Tensor:
        draw = self._draw(batch, kernel, schedule, random, torch.zeros(len(batch)), "independent")
        xt = self.vectors(draw, batch, kernel, schedule)[2]
        return counted(cross_entropy(denoise.refined(xt, draw.t).logits, batch.tokens), batch)


def cross_entropy(logits: Tensor | None, tokens: Tensor) -> Tensor:
    """Return -log p of ``tokens`` int64 [b, l] under ``logits`` [b, l, v], nats, [b, l]."""
    if logits is None:
        raise ValueError("the network predicts no logits")
    return F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none")
