"""Objectives that are upper bounds on -log p(x_0) in continuous time, nats per sequence.

As in the literature, all omit the prior term KL(q(x_1 | x_0) || prior), which is of the order of exp(-sigma(1)) times
length times log(vocabulary size). Training losses that are integrals over time also omit the interval from 0 to
``t_min``; evaluation adds the cost of decoding the tokens that are noisy at ``t_min``
(:meth:`Objective.reconstruction`), without which the bound could be less than -log p. Axes: b batch, l length, n
states.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.numerics import take, tiny
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective, lower_posterior

__all__ = ["MaskedCount", "Nelbo", "OverTime", "ScoreEntropy", "TimeConfig", "Times", "counted", "uniform"]

Times = Literal["low_discrepancy", "independent"]


def uniform(times: Times, batch: Batch, random: Randomness) -> Tensor:
    """Draw one uniform number in [0, 1) for each row of a batch.

    Args:
        times: ``low_discrepancy``: an even grid over the global batch with one random offset; ``independent``:
            independent numbers.
        batch: The batch, which gives the number of rows b and the device.
        random: Source of random numbers.

    Returns:
        float32 [b].
    """
    rows = len(batch)
    return (random.low_discrepancy(rows) if times == "low_discrepancy" else random.rand(rows)).to(batch.tokens.device)


class TimeConfig(ComponentConfig):
    """Config keys of objectives that are integrals over time: the distribution of the times."""

    times: Times = "low_discrepancy"
    """Distribution of the times of a global batch. ``low_discrepancy``: an even grid with one random offset (less
    variance, no bias); ``independent``: independent uniform times."""
    t_min: Annotated[float, pydantic.Field(gt=0, lt=0.1)] = 1e-4
    """Lower end of the interval of training times t, above 0 and below 0.1; t = 0 is clean text. Evaluation of the
    bound includes smaller noise too (for strings, down to a total noise of 1e-4)."""

    def draw(self, batch: Batch, random: Randomness, t: Tensor | None) -> tuple[Tensor, float]:
        """Draw one time in [t_min, 1) for each row, or return the given times.

        Args:
            batch: The batch, which gives the number of rows b and the device.
            random: Source of random numbers.
            t: Times to use instead, [b]; None: draw them.

        Returns:
            Times, float32 [b]; and the width 1 - t_min of their interval, or 1 for a given ``t``.
        """
        if t is not None:
            return t, 1.0
        return self.t_min + (1 - self.t_min) * uniform(self.times, batch, random), 1 - self.t_min


class OverTime(Objective):
    """Base class of objectives that integrate over t from ``t_min`` to 1, estimated at one uniform time per row."""

    steady = True
    Config: ClassVar[type[ComponentConfig]] = TimeConfig
    config: TimeConfig

    def draw(self, request: DrawRequest) -> Draw:
        t, width = self.config.draw(request.batch, request.random, request.t)
        sigma, dsigma = request.schedule.sigma(t).detach(), request.schedule.dsigma(t).detach()
        return Draw(request.noised(sigma), t, sigma, dsigma, torch.full_like(t, width))

    def reconstruction_draw(self, request: DrawRequest) -> Draw | None:
        lowest = torch.full((len(request.batch),), self.config.t_min, device=request.batch.tokens.device)
        return OverTime.draw(self, dataclasses.replace(request, t=lowest))

    def reconstruction(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        probs = lower_posterior(outputs, draw, kernel, torch.zeros_like(draw.sigma))
        return counted(-take(probs, batch.tokens).clamp(min=tiny(probs)).log(), batch)


def counted(per_position: Tensor, batch: Batch) -> Tensor:
    """Sum a loss over the positions that are both in the loss and subject to noise.

    Args:
        per_position: Loss of each position, [b, l].
        batch: The batch, whose masks ``loss`` and ``corrupt``, bool [b, l], select the positions.

    Returns:
        Loss of each row, [b].
    """
    return torch.where(batch.loss & batch.corrupt, per_position, 0.0).sum(-1)


class ScoreEntropy(OverTime, kind="objective"):
    """Denoising score entropy, a bound on -log p(x_0) for any kernel, nats (SEDD, arXiv 2310.16834, theorem 3.6)."""

    reads = ("log_score", "log_x0")
    sums_positions = True

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        if "log_score" in outputs:
            log_score = outputs["log_score"].float()
        else:
            log_score = kernel.log_score(outputs["log_x0"].float(), draw.xt, draw.sigma)
        entropy = kernel.score_entropy(log_score, draw.xt, batch.tokens, draw.sigma)
        return draw.weight * draw.dsigma * counted(entropy, batch)


class Nelbo(OverTime, kind="objective"):
    """Negative ELBO of a network that predicts the clean token (``log_x0``), in continuous time, nats.

    It is the bound of MDLM for the kernel ``absorb`` (arXiv 2406.07524, eq. 11), of UDLM for ``uniform`` and of GIDD
    for ``mixture``. The optimal prediction is the posterior of the clean token given all other positions.
    """

    reads = ("log_x0",)
    sums_positions = True

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        per_position = kernel.nelbo(outputs["log_x0"].float(), draw.xt, batch.tokens, draw.sigma)
        return draw.weight * draw.dsigma * counted(per_position, batch)

    def evaluated(self, kernel: Kernel) -> Objective:
        return MaskedCount(MaskedCount.Config(), self.context) if kernel.masks_evenly else self.bound()


class MaskedCount(Objective, kind="objective"):
    """Negative ELBO under the kernel ``absorb``, as a sum over the number of masked tokens, nats.

    The sum replaces the integral over time. Of the L tokens of a row that may be corrupted, k are masked, with k
    uniform from 1 to L; the cross-entropy at the masks has the weight L/k (arXiv 2406.03736, eq. 3.6). The bound equals
    that of ``nelbo`` without the truncation at ``t_min``, does not depend on the schedule, and its estimate has less
    variance.
    """

    reads = ("log_x0",)
    sums_positions = True
    needs_mask = True
    over = "masked"

    class Config(ComponentConfig):
        counts: Times = "low_discrepancy"
        """Distribution of the number of masks per row over a global batch. ``low_discrepancy``: an even grid with one
        random offset (less variance, no bias); ``independent``: independent uniform counts."""

    config: Config

    def draw(self, request: DrawRequest) -> Draw:
        batch, xt, t = request.batch, request.xt, request.t
        mask, free = request.kernel.require_mask(), batch.corrupt.sum(-1)
        if xt is None:
            t = uniform(self.config.counts, batch, request.random) if t is None else t
            count = (1 + (t * free).long()).clamp(max=free)
            order = request.random.rand(*batch.tokens.shape).to(batch.tokens.device).masked_fill(~batch.corrupt, 2.0)
            rank = order.argsort(-1).argsort(-1)
            xt = batch.tokens.masked_fill((rank < count[:, None]) & batch.corrupt, mask)
        count = ((xt == mask) & batch.corrupt).sum(-1)
        share = count / free.clamp(min=1)
        # the total noise at which this share is expected, for a network that depends on it
        sigma = -torch.log1p(-share.clamp(max=1 - 1e-3))
        weight = free / count.clamp(min=1)
        return Draw(xt, share, sigma, torch.ones_like(sigma), weight.float())

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        log_x0 = take(outputs["log_x0"].float(), batch.tokens)
        return draw.weight * counted(torch.where(draw.xt == kernel.require_mask(), -log_x0, 0.0), batch)
