"""LangFlow: kernel of normalised embeddings in continuous time, cross-entropy objective, and ODE sampler.

Axes: b batch, l length, d width of a vector, v tokens.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import FittedSchedule, Schedule
from sedd_graph.diffusion.vectors.denoiser import Denoiser
from sedd_graph.diffusion.vectors.flow import Flow, Method, advance, root_snr
from sedd_graph.diffusion.vectors.gaussian import along, kl, log_snr, noise_std, signal, spread
from sedd_graph.diffusion.vectors.kernel import Estimate, VectorKernel, VectorKernelConfig
from sedd_graph.diffusion.vectors.objective import VectorDraw, VectorObjective, counted
from sedd_graph.diffusion.vectors.sampler import VectorSampler, VectorSamplerConfig, VectorWalk
from sedd_graph.errors import UserError

from ..network._shared import full_linear

__all__ = ["LangFlow", "NormalizedGaussian", "Ode"]


class NormalizedGaussian(VectorKernel, kind="vector_kernel"):
    """Learned embeddings of equal lengths, with Gaussian noise in continuous time (LangFlow, arXiv 2604.11748).

    x_0 is the embedding, and x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise. With ``precondition`` the logits of the
    network are added to log p(x_t | token), so that the network predicts the log-probability of the token given the other
    positions, and rounding is exact at little noise whatever the network.
    """

    learned = True
    example: ClassVar[Mapping[str, Any]] = {"vocab": 4, "width": 2}

    class Config(VectorKernelConfig):
        normalize: Literal["length", "layer"] = "length"
        """Normalisation of the embeddings. ``length``: each is scaled to ``length``, as in the published code; ``layer``: its
        mean over the width is subtracted before (layer normalisation)."""
        length: Annotated[float, pydantic.Field(gt=0, le=1e4)] | None = None
        """Length of every embedding, at most 10,000; null: sqrt(width), so that a coordinate has mean square 1."""
        precondition: bool = True
        """True: the network's logits are added to log p(x_t | token), which is sqrt(alpha_bar) x_t . embedding / (1 - alpha_bar)
        up to a constant."""

        @pydantic.model_validator(mode="after")
        def _wide_enough(self) -> "NormalizedGaussian.Config":
            least = 3 if self.normalize == "layer" else 2
            if isinstance(self.width, int) and self.width < least:
                raise ValueError(f"width must be at least {least}: narrower normalised vectors are all alike")
            return self

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.embedding = nn.Parameter(torch.randn(self.config.vocab, self.config.width))

    @classmethod
    def toy(cls, config: Config, states: int) -> Config:
        # two layer-normalised vectors of two numbers are alike or opposite
        length = cls.length_of(config)  # the same, so that the noise levels of the schedule are as far from rounding
        changes = {"vocab": states, "width": 2, "normalize": "length", "length": length}
        return config.model_copy(update=changes)

    @classmethod
    def length_of(cls, config: Config) -> float:
        """Return the length of the embeddings."""
        return math.sqrt(config.width) if config.length is None else config.length

    @torch.no_grad()
    def place(self, table: Tensor) -> None:
        self.embedding.copy_(table)

    def table(self) -> Tensor:
        rows = self.embedding
        if self.config.normalize == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        return F.normalize(rows, dim=-1) * self.length_of(self.config)

    def logits(self, x0: Tensor) -> Tensor:
        # embeddings have equal lengths, so the nearest one has the largest product
        return full_linear(x0, self.table(), None)

    def translate(self, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Estimate:
        if "x0" in outputs or not self.config.precondition:
            return super().translate(outputs, x, sigma)
        with full_precision(x):
            scale = signal(sigma) / noise_std(sigma).square()
            evidence = self.logits(along(scale, x) * x)
            return super().translate({"logits": outputs["logits"].float() + evidence}, x, sigma)


class LangFlow(VectorObjective, kind="vector_objective"):
    """Cross-entropy of the tokens given noisy vectors (LangFlow, arXiv 2604.11748), for a network that predicts logits.

    Times are uniform, so noise levels are drawn as the schedule distributes them; a ``gumbel`` schedule is fitted to the
    cross-entropy along the way. Cross-entropy is a Bregman divergence, so its minimum is the posterior of the tokens, and
    the mean embedding under it is E[x_0 | x_t]. The training loss is not a bound.

    Evaluation reports an upper bound on -log p(tokens) of the process in continuous time: the integral of snr / 2 |x_0 -
    estimate|^2 over gamma = -log snr, plus KL(q(x_1 | tokens) || N(0, 1)), plus E[-log p(tokens | x_t)] at t = 0 (VDM, arXiv
    2107.00630). ``eval --likelihood ode`` reports the bound of the probability-flow ODE, integrated in a finite number of steps.
    """

    reads = ("logits",)
    measure = "time"
    terms = frozenset({"cross_entropy"})

    class Config(ComponentConfig):
        self_conditioning: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.25
        """Share of the training rows whose network is conditioned on a first estimate, if the graph has the input
        ``estimate``; from 0 to 1."""
        times: Literal["independent", "low_discrepancy"] = "low_discrepancy"
        """Distribution of the times of a global batch. ``independent``: independent uniform times; ``low_discrepancy``: an
        even grid with one random offset (less variance, no bias). Evaluation takes the grid."""
        steps: Annotated[int, pydantic.Field(ge=1, le=100_000)] = 32
        """Number of steps in which ``eval --likelihood ode`` integrates the ODE, from 1 to 100,000."""
        method: Method = "heun"
        """Method of that integration. ``euler``: order 1; ``heun``: order 2, with twice the evaluations."""
        probes: Annotated[int, pydantic.Field(ge=1, le=1024)] = 1
        """Number of random vectors in Hutchinson's estimate of each divergence, from 1 to 1,024."""

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
        if t is None:
            t = random.low_discrepancy(rows) if times == "low_discrepancy" else random.rand(rows)
        t = t.double()
        noise = random.randn(rows, *batch.tokens.shape[1:], kernel.width)
        refined = random.rand(rows) < self.config.self_conditioning
        sigma, rate = kernel.sigma(schedule, t), schedule.dsigma(t)
        # d gamma / dt = (d sigma / dt) / (1 - alpha_bar); the integrand over gamma is snr / 2 |x_0 - estimate|^2
        weight = 0.5 * torch.exp(log_snr(sigma)) * rate / -torch.expm1(-sigma)
        return VectorDraw(t, torch.zeros_like(noise), noise, weight.float(), refined)

    def loss(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        xt = self.vectors(draw, batch, kernel, schedule)[2]
        logits = denoise.refined(xt, draw.t, draw.refined).logits
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
        end = kernel.sigma(schedule, torch.ones(1, dtype=torch.float64, device=clean.device))
        mean = along(signal(end), clean) * clean
        last = kl(mean, spread(end), torch.zeros_like(mean), torch.ones_like(end)).sum(-1)
        return counted(draw.weight[:, None] * (clean - found).square().sum(-1) + last, batch)

    def reconstruction(
        self, denoise: Denoiser, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness
    ) -> Tensor:
        start = torch.zeros(len(batch), dtype=torch.float64, device=batch.tokens.device)
        draw = self._draw(batch, kernel, schedule, random, start, "independent")
        xt = self.vectors(draw, batch, kernel, schedule)[2]
        return counted(cross_entropy(denoise.refined(xt, start).logits, batch.tokens), batch)

    def flow(self, kernel: VectorKernel, schedule: Schedule) -> Flow:
        config = self.config
        return Flow(
            kernel=kernel,
            schedule=schedule,
            steps=config.steps,
            method=config.method,
            probes=config.probes,
        )


def cross_entropy(logits: Tensor | None, tokens: Tensor) -> Tensor:
    """Return -log p of ``tokens`` int64 [b, l] under ``logits`` [b, l, v], nats, [b, l]."""
    if logits is None:
        raise ValueError("the network predicts no logits")
    return F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none")


class Ode(VectorSampler, kind="vector_sampler"):
    """Sampler of the probability-flow ODE: from noise to text without further noise (LangFlow, arXiv 2604.11748).

    The ODE is dy / ds = E[x_0 | x_t], with y = x_t / sqrt(1 - alpha_bar) and s = sqrt(alpha_bar / (1 - alpha_bar)). An ``euler``
    step is that of ``ddim`` with eta 0. The last evaluation, at the lowest noise, gives the tokens: the most likely ones of a
    network that predicts logits, otherwise the nearest.
    """

    class Config(VectorSamplerConfig):
        method: Method = "heun"
        """Method of integration. ``euler``: order 1, one evaluation of the network in a step; ``heun``: order 2, two
        evaluations."""
        refine: bool = False
        """How a self-conditioned network is conditioned. False: on the estimate before, as published; True: on its first
        estimate at the same vectors (twice the evaluations), so that samples are those of the ODE whose likelihood
        ``eval --likelihood ode`` reports."""

    config: Config

    @property
    def order(self) -> float:
        return 2.0 if self.config.method == "heun" else 1.0

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        if kernel.steps is not None or kernel.start_variance(schedule) > 0:
            return "a kernel in continuous time whose x_0 is the embedding, such as normalized_gaussian"
        return None

    def walk(self, walk: VectorWalk, times: Tensor) -> None:
        classifier = walk.settings.classifier
        if classifier is not None and classifier.config.updates:
            raise UserError(
                "sample: the classifier's updates need a sampler that draws noise, such as ddpm: take updates: 0"
            )
        every = [t.expand(len(walk.x)) for t in times]
        for t, s in itertools.pairwise(every):
            here, there = walk.sigma(t), walk.sigma(s)
            y, start, end = walk.x / along(noise_std(here), walk.x), root_snr(here), root_snr(there)
            deviation = along(noise_std(there), y)
            first = self._estimate(walk, t).x0
            found = advance(y, start, end, first)
            if self.config.method == "heun":
                found = advance(y, start, end, first, self._estimate(walk, s, deviation * found).x0)
            walk.put(deviation * found, s)
            walk.end_step()
        last = self._estimate(walk, every[-1])
        found = last.x0
        if last.logits is not None:
            allowed = walk.settings.allowed
            logits = last.logits if allowed is None else last.logits.masked_fill(~allowed, -torch.inf)
            found = walk.kernel.embed(logits.argmax(-1))
        walk.put(found.to(walk.x.dtype), torch.zeros_like(every[-1]))
        walk.end_step()

    def _estimate(self, walk: VectorWalk, t: Tensor, x: Tensor | None = None) -> Estimate:
        """Return the estimate at the current vectors, or at ``x``, and time ``t``."""
        if self.config.refine:
            walk.last = None
            walk.last = walk.estimate(t, x=x)
        return walk.estimate(t, x=x)
