"""Objective of ELF: squared error of clean contextual vectors, and cross-entropy of reading tokens from them.

Axes: b batch, l length, d width of a vector, v tokens.
"""

import dataclasses
import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor
from torch.nn.functional import softplus

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.denoiser import Denoiser, first_time
from sedd_graph.diffusion.vectors.gaussian import log_snr, noise_std, signal
from sedd_graph.diffusion.vectors.kernel import VectorKernel
from sedd_graph.diffusion.vectors.objective import Decoding, VectorDraw, counted

from ._bound import draw_times, each_position, importance
from ._flow_objective import FlowObjective
from .langflow import cross_entropy

__all__ = ["Elf"]


@dataclasses.dataclass(frozen=True)
class ElfDraw(VectorDraw):
    """Random numbers and vectors of one training step; the vectors come from a frozen encoder, so need no gradient.

    Attributes:
        clean: Clean vectors, float32 [b, l, d].
        decoded: Rows that train decoding, bool [b].
        noisy: Vectors that the network sees: those of time ``t``, or in rows that train decoding those of the noise level
            of each position; clean at positions that are not corrupted. float32 [b, l, d].
        seen: Times that the network is told: ``t``, or that of the lowest noise in rows that train decoding, float64 [b].
    """

    clean: Tensor
    decoded: Tensor
    noisy: Tensor
    seen: Tensor


class Elf(FlowObjective, kind="vector_objective"):
    """Loss of ELF (arXiv 2605.10938) on contextual vectors: one network that denoises, and that reads tokens at the end.

    A share of the rows trains decoding: their positions are noised independently, the network's input ``decode`` is 1, its
    time that of the lowest noise, and the loss is the cross-entropy of the tokens under its ``logits``. The other rows
    train the estimate ``x0``: the mean over the width of the squared error of x_0, weighted by 1 / max(1 - tau, least)^2,
    which is that of the velocity of the rectified flow. The training loss is not a bound. (The published code draws the
    branch for whole batches.)

    Evaluation reports an upper bound on -log p(tokens). The encoder is the variational posterior of the vectors given the
    tokens, as of an autoencoder: the bound is that of ``langflow``, with E[-log p(tokens | x_t)] at the lowest noise under
    the network's ``logits``.
    """

    reads = ("x0",)
    measure = "time"
    unit = "squared error + nats"
    terms = frozenset({"mse", "decoding"})

    class Config(FlowObjective.Config):
        decode: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
        """Share of the training rows that train decoding, between 0 and 1."""
        decode_mean: Annotated[float, pydantic.Field(ge=-10, le=10)] = 0.8
        """Mean of logit(tau) of the positions in these rows, from -10 to 10; tau is the weight of the clean vector."""
        decode_std: Annotated[float, pydantic.Field(ge=0.05, le=10)] = 0.8
        """Standard deviation of logit(tau) of the positions in these rows, from 0.05 to 10."""
        decode_noise_scale: Annotated[float, pydantic.Field(ge=0.01, le=100)] = 5.0
        """Standard deviation of the noise in these rows, from 0.01 to 100, in the terms of ``logit_normal``."""
        noise_scale: Annotated[float, pydantic.Field(ge=0.01, le=100)] = 2.0
        """Standard deviation of the noise of the rectified flow whose tau weighs the squared error, from 0.01 to 100; that
        of the schedule ``logit_normal``."""
        least: Annotated[float, pydantic.Field(ge=1e-3, le=1)] = 0.05
        """Least value of 1 - tau in the weight of the squared error, from 0.001 to 1."""
        self_conditioning: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
        """Share of the training rows whose network is conditioned on a first estimate, if the graph has the input
        ``estimate``; from 0 to 1. Decoding is not conditioned."""

    config: Config

    def lacks(self, kernel: VectorKernel, schedule: Schedule) -> str | None:
        if not kernel.contextual or kernel.steps is not None or kernel.start_variance(schedule) > 0:
            return "a kernel in continuous time whose vectors depend on the whole row, such as encoded_gaussian"
        return "a schedule without trained parameters, such as logit_normal" if schedule.learned else None

    @property
    def decoding(self) -> Decoding:
        config = self.config
        return Decoding(
            config.decode, 2 * (config.decode_mean - math.log(config.decode_noise_scale)), 2 * config.decode_std
        )

    def emphasis(self, log_snr: Tensor) -> Tensor:
        rest = torch.sigmoid(-log_snr / 2 - math.log(self.config.noise_scale))  # 1 - tau
        return rest.clamp(min=self.config.least) ** -2

    def draw(
        self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> ElfDraw:
        decoded = random.systematic(len(batch), self.config.decode)
        return self._draw(batch, kernel, schedule, random, t, self.config.times, decoded)

    def bound_draw(self, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness) -> ElfDraw:
        # even in the log-SNR: few times of the schedule fall where there is little noise, and their weights would be large
        rows, device = len(batch), batch.tokens.device
        ends = torch.tensor([first_time(schedule), 1.0], dtype=torch.float64, device=device)
        low, high = log_snr(kernel.sigma(schedule, ends)).flip(0)
        levels = low + (high - low) * random.low_discrepancy(rows).double()
        t = schedule.time(softplus(-levels))
        decoded = torch.zeros(rows, dtype=torch.bool, device=device)
        draw = self._draw(batch, kernel, schedule, random, t, "independent", decoded)
        weight = 0.5 * torch.exp(log_snr(kernel.sigma(schedule, draw.t))) * (high - low)
        return dataclasses.replace(draw, weight=weight.float())

    def _draw(
        self,
        batch: Batch,
        kernel: VectorKernel,
        schedule: Schedule,
        random: Randomness,
        t: Tensor | None,
        times: str,
        decoded: Tensor,
    ) -> ElfDraw:
        rows, length = batch.tokens.shape
        t = draw_times(rows, schedule, times, random, t)
        noise = random.randn(rows, length, kernel.width)
        # both choices have offsets of their own: whether a row is conditioned is independent of whether it is decoded
        refined = random.systematic(rows, self.config.self_conditioning) & ~decoded
        zero = torch.zeros_like(noise)
        base = VectorDraw(t, zero, noise, importance(t, kernel, schedule), refined)
        clean, _, noisy = self.vectors(base, batch, kernel, schedule)
        levels = self.decoding.mean + self.decoding.std * random.randn(rows, length).double()
        own = softplus(-levels)
        each = signal(own).to(clean.dtype)[..., None] * clean + noise_std(own).to(clean.dtype)[..., None] * noise
        each = torch.where(batch.corrupt[..., None], each, clean)
        first = torch.full_like(t, first_time(schedule))
        return ElfDraw(
            **{f.name: getattr(base, f.name) for f in dataclasses.fields(VectorDraw)},
            clean=clean,
            decoded=decoded,
            noisy=torch.where(decoded[:, None, None], each, noisy),
            seen=torch.where(decoded, first, t),
        )

    def loss(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        drawn = _own(draw)
        share = self.config.self_conditioning
        found = denoise.refined(drawn.noisy, drawn.seen, drawn.refined, share, drawn.decoded)
        error = (drawn.clean - found.x0).square().mean(-1)
        weight = self.emphasis(log_snr(kernel.sigma(schedule, drawn.t))).to(error.dtype)
        nats = cross_entropy(found.logits, batch.tokens)
        return counted(torch.where(drawn.decoded[:, None], nats, weight[:, None] * error), batch)

    def bound(
        self, denoise: Denoiser, draw: VectorDraw, batch: Batch, kernel: VectorKernel, schedule: Schedule
    ) -> Tensor:
        clean, _, xt = self.vectors(draw, batch, kernel, schedule)
        found = denoise.refined(xt, draw.t).x0
        return counted(each_position(clean, found, draw.weight, kernel, schedule), batch)

    def reconstruction(
        self, denoise: Denoiser, batch: Batch, kernel: VectorKernel, schedule: Schedule, *, random: Randomness
    ) -> Tensor:
        decoded = torch.zeros(len(batch), dtype=torch.bool, device=batch.tokens.device)
        at = torch.zeros(len(batch), device=batch.tokens.device)
        draw = self._draw(batch, kernel, schedule, random, at, "independent", decoded)
        return counted(cross_entropy(denoise.decode(draw.noisy), batch.tokens), batch)


def _own(draw: VectorDraw) -> ElfDraw:
    """Return ``draw`` as the draw of this objective. Raises TypeError for that of another."""
    if not isinstance(draw, ElfDraw):
        raise TypeError(f"the loss of 'elf' needs its own draw, not a {type(draw).__name__}")
    return draw
