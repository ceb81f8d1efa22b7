"""Objectives of strings: bounds for processes that delete and insert tokens.

A draw holds every part of the loss that is independent of the network, so that the loss itself is a few sums and compiles. Axes: b
rows, w positions of a noisy string (the start state first), n tokens of a clean string, v data tokens.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import FLOOR
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.birth_death import BIRTHS_AND_DEATHS, ONLY_DELETES, BirthDeath
from sedd_graph.diffusion.strings.kernel import Draw_, Kernel_, StringDraw, StringKernel, StringObjective
from sedd_graph.diffusion.strings.strings import Strings

from ..objectives.bounds import TimeConfig

__all__ = ["DICE", "DISE", "ClockObjective", "NoiseLevel", "RatioDraw"]


@dataclasses.dataclass(frozen=True)
class RatioDraw(StringDraw):
    """Noisy strings, the regression targets of the network's rates at them, and the weights of these in the loss.

    The fields that are not described here are those of :class:`~sedd_graph.diffusion.strings.birth_death.Target`.

    Attributes:
        weights: float32 [b, 2], weights of the loss terms of insertions and of deletions.
        constant: float32 [b], added to the loss, nats.
    """

    missing: Tensor
    symbols: Tensor
    fresh: Tensor
    spurious: Tensor
    weights: Tensor
    constant: Tensor


class NoiseLevel(NamedTuple):
    """The noise level of each row of a draw.

    Attributes:
        sigma: Total noise, [b].
        slope: Its derivative in the time, or the clock, that it was drawn by, [b].
        interval: Width of the interval of training times, a factor of the loss; None for draws of the bound.
    """

    sigma: Tensor
    slope: Tensor
    interval: float | None = None


class ClockObjective(StringObjective[Kernel_, Draw_]):
    """An objective whose training times are uniform, and whose bound is an integral over the clock of the kernel."""

    abstract: ClassVar[bool] = True
    config: TimeConfig

    @abstractmethod
    def draw_at(self, batch: Batch, kernel: Kernel_, level: NoiseLevel, random: Randomness) -> Draw_:
        """Draw noisy strings at a noise level, and compute the terms of the loss.

        Draws of the bound have strings of any length, exact targets, and weights that are not capped.
        """

    def corrupt(
        self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> Draw_:
        t, width = self.config.draw(batch, random, t)
        return self.draw_at(batch, kernel, NoiseLevel(schedule.sigma(t), schedule.dsigma(t), width), random)

    def bound_draw(self, batch: Batch, kernel: Kernel_, schedule: Schedule, *, random: Randomness) -> Draw_:
        u = random.low_discrepancy(len(batch)).double().to(batch.tokens.device).clamp(min=1e-9)
        end = float(schedule.sigma(torch.ones(1, dtype=torch.float64, device=u.device)))
        sigma, slope = kernel.clock(u, end)
        draw = self.draw_at(batch, kernel, NoiseLevel(sigma, slope), random)
        # the network was never trained beyond the end of the schedule
        return dataclasses.replace(draw, sigma=draw.sigma.clamp(max=end))


class StringConfig(TimeConfig):
    """Config of ``dise`` and ``dice``: times, regression targets, and room for insertions."""

    targets: Literal["exact", "sampled"] = "exact"
    """Regression targets in training. ``exact``: conditional ratios by dynamic programming. ``sampled``: the deletions that were
    drawn; unbiased, cheaper, more variance; with the kernel ``delete`` only."""
    room: Annotated[float, pydantic.Field(ge=1, le=64)] = 2.0
    """Width of noisy rows in training, as a multiple of that of clean rows, from 1 to 64, for a kernel that inserts. Tokens beyond
    it are dropped and counted. Bounds use whole strings."""


def _gaps(outputs: Mapping[str, Tensor], draw: StringDraw) -> Tensor:
    """Return ``log_insert``, float32 [b, w, v], 0 at padding, where its exponential could overflow."""
    return outputs["log_insert"].float().masked_fill(~draw.attend[..., None], 0.0)


class DISE(ClockObjective[BirthDeath, RatioDraw], kind="string_objective"):
    """Score entropy of insertions, and of deletions if the kernel inserts (DID, arXiv 2603.23507; TKF91).

    With reverse rates s and conditional ratios R the loss is the sum of rate (s - R log s + R log R - R) over all edits. With
    ``indel`` the bound includes the divergence of the noisiest strings from the prior. It is a bound on the probability of the
    tokens and of their number.
    """

    Config: ClassVar[type[ComponentConfig]] = StringConfig
    config: StringConfig

    def lacks(self, kernel: StringKernel) -> str | None:
        if not isinstance(kernel, BirthDeath):
            return BIRTHS_AND_DEATHS
        return ONLY_DELETES + " for its sampled targets" if kernel.births and self.config.targets == "sampled" else None

    def draw_at(self, batch: Batch, kernel: BirthDeath, level: NoiseLevel, random: Randomness) -> RatioDraw:
        (sigma, slope, interval), width = level, None
        if interval is not None:
            width, slope = (
                1 + (round(batch.width * self.config.room) if kernel.births else batch.width),
                interval * slope,
            )
        strings = kernel.sample(batch, sigma, random=random, width=width)
        sampled = interval is not None and self.config.targets == "sampled"
        target = kernel.sampled_target(batch, strings) if sampled else kernel.target(batch, strings, sigma)
        weights = (kernel.weights(sigma.double()) * slope[:, None].double()).float()
        terms = vars(target) | {"constant": (weights * target.constant).sum(-1)}
        return RatioDraw(strings.tokens, strings.attend, sigma.float(), cut=strings.cut, weights=weights, **terms)

    def bound_draw(self, batch: Batch, kernel: BirthDeath, schedule: Schedule, *, random: Randomness) -> RatioDraw:
        draw = super().bound_draw(batch, kernel, schedule, random=random)
        if not kernel.births:
            return draw
        last = schedule.sigma(torch.ones(1, dtype=torch.float64, device=draw.xt.device)).expand(len(batch))
        noise = kernel.sample(batch, last, random=random, width=None)
        gap = kernel.log_p(batch, noise, last) - kernel.log_prior(noise)
        return dataclasses.replace(draw, constant=draw.constant + gap.float())

    def loss(self, outputs: Mapping[str, Tensor], draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        return self._insertions(_gaps(outputs, draw), draw, kernel) + self._deletions(outputs, draw) + draw.constant

    def _insertions(self, log_insert: Tensor, draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        total = torch.where(draw.attend, log_insert.exp().sum(-1), 0.0)
        index = draw.symbols[:, None].expand(-1, log_insert.shape[1], -1)
        linear = (draw.missing * log_insert.gather(-1, index).transpose(1, 2)).sum((1, 2))
        if kernel.births:
            linear = linear + (draw.fresh * (log_insert @ kernel.law.to(log_insert))).sum(-1)
        return draw.weights[:, 0] * (total.sum(-1) - linear)

    def _deletions(self, outputs: Mapping[str, Tensor], draw: RatioDraw) -> Tensor:
        if "log_delete" not in outputs:
            return torch.zeros_like(draw.constant)
        token = draw.attend & (torch.arange(draw.attend.shape[1], device=draw.attend.device) > 0)
        log_delete = outputs["log_delete"].float().masked_fill(~token, 0.0)
        return draw.weights[:, 1] * torch.where(token, log_delete.exp() - draw.spurious * log_delete, 0.0).sum(-1)


class DICE(DISE, kind="string_objective"):
    """Cross-entropy of insertions, for strings that all have one known length (DID, arXiv 2603.23507).

    The number of missing tokens is then known, and the head's rates are normalised to sum to this number over the row. The network
    learns only where tokens are missing and which; its rates do not depend on time. It requires ``data.rows: stream``.
    """

    one_length = True

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, BirthDeath) and not kernel.births else ONLY_DELETES

    def loss(self, outputs: Mapping[str, Tensor], draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        scaled = _scaled(_gaps(outputs, draw), draw.attend, draw.missing.sum((1, 2)))
        return self._insertions(scaled, draw, kernel) + draw.constant

    def rates(self, outputs: Mapping[str, Tensor], strings: Strings, longest: int) -> Mapping[str, Tensor]:
        left = (longest - strings.lengths).to(outputs["log_insert"].dtype)
        return {"log_insert": _scaled(outputs["log_insert"], strings.attend, left)}


def _scaled(log_insert: Tensor, attend: Tensor, total: Tensor) -> Tensor:
    """Return ``log_insert`` [b, w, v] shifted so that its exponentials sum to ``total`` [b] over the gaps of a row."""
    gaps = torch.where(attend, log_insert.logsumexp(-1), FLOOR)
    shift = total.clamp(min=1e-9).log() - gaps.logsumexp(-1)
    return log_insert + torch.where(total > 0, shift, FLOOR)[:, None, None]
