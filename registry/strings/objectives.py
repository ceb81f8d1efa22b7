"""Bounds for strings that are deleted from and inserted into. Axes: b rows, w positions, n clean tokens, v data tokens.

A draw holds all that does not depend on the network, so that the loss is a few sums and compiles with it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import FLOOR
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.birth_death import BIRTHS_AND_DEATHS, ONLY_DELETES, BirthDeath
from sedd_graph.diffusion.strings.kernel import StringDraw, StringKernel, StringObjective
from sedd_graph.diffusion.strings.strings import Strings

from ..objectives.bounds import TimeConfig

__all__ = ["DICE", "DISE", "RatioDraw"]


@dataclasses.dataclass(frozen=True)
class RatioDraw(StringDraw):
    """A draw with conditional ratios (the fields of :class:`Target`). ``weights`` float32 [b, 2]: what the sums over insertions
    and deletions are multiplied by; ``constant`` float32 [b] is added."""

    missing: Tensor
    symbols: Tensor
    fresh: Tensor
    spurious: Tensor
    weights: Tensor
    constant: Tensor


class StringConfig(TimeConfig):
    """How times are drawn, and what the network is held to."""

    targets: Literal["exact", "sampled"] = "exact"
    """``exact``: the ratios themselves, by dynamic programming. ``sampled``: the deletion that was drawn, of the same mean and
    more variance, for no work; ``delete`` only, and in training only."""
    room: Annotated[float, pydantic.Field(ge=1, le=64)] = 2.0
    """Noisy rows hold this many times the tokens of a clean one in training, where insertions make them longer; what does
    not fit is cut off and counted. Bounds are of whole strings."""


def _gaps(outputs: Mapping[str, Tensor], draw: StringDraw) -> Tensor:
    """log_insert float32 [b, w, v], 0 in padding, so that nothing there can overflow."""
    return outputs["log_insert"].float().masked_fill(~draw.attend[..., None], 0.0)


class DISE(StringObjective[BirthDeath, RatioDraw], kind="string_objective"):
    """Score entropy of insertions, and of deletions where the kernel inserts (DID, arXiv 2603.23507; TKF91).

    Of the reverse rates s and the conditional ratios R: sum of rate (s - R log s + R log R - R) over all edits. With ``indel``
    the bound includes the divergence of the noisiest strings from the prior. A string's length is part of what is bounded.
    """

    class Config(StringConfig):
        pass

    def lacks(self, kernel: StringKernel) -> str | None:
        if not isinstance(kernel, BirthDeath):
            return BIRTHS_AND_DEATHS
        return ONLY_DELETES + " for its sampled targets" if kernel.births and self.config.targets == "sampled" else None

    def corrupt(
        self, batch: Batch, kernel: BirthDeath, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> RatioDraw:
        t, width = self.config.draw(batch, random, t)
        room = round(batch.width * self.config.room) if kernel.births else batch.width
        sampled = self.config.targets == "sampled"
        return self._draw(
            batch, kernel, schedule.sigma(t), width * schedule.dsigma(t), random, width=1 + room, sampled=sampled
        )

    def bound_draw(self, batch: Batch, kernel: BirthDeath, schedule: Schedule, *, random: Randomness) -> RatioDraw:
        u = random.low_discrepancy(len(batch)).double().to(batch.tokens.device).clamp(min=1e-9)
        end = schedule.sigma(torch.ones(1, dtype=torch.float64, device=u.device))
        sigma, slope = kernel.clock(u, float(end))
        draw = self._draw(batch, kernel, sigma, slope, random, width=None, sampled=False)
        # beyond the end of the schedule the network is told of the end: it has never seen more
        draw = dataclasses.replace(draw, sigma=draw.sigma.clamp(max=float(end)))
        if kernel.births:
            last = end.expand(len(batch))
            noise = kernel.sample(batch, last, random=random, width=None)
            gap = kernel.log_p(batch, noise, last) - kernel.log_prior(noise)
            draw = dataclasses.replace(draw, constant=draw.constant + gap.float())
        return draw

    def _draw(
        self,
        batch: Batch,
        kernel: BirthDeath,
        sigma: Tensor,
        slope: Tensor,
        random: Randomness,
        *,
        width: int | None,
        sampled: bool,
    ) -> RatioDraw:
        strings = kernel.sample(batch, sigma, random=random, width=width)
        found = kernel.sampled_target(batch, strings) if sampled else kernel.target(batch, strings, sigma)
        weights = (kernel.weights(sigma.double()) * slope[:, None].double()).float()
        return RatioDraw(
            strings.tokens,
            strings.attend,
            sigma.float(),
            found.missing,
            found.symbols,
            found.fresh,
            found.spurious,
            weights,
            (weights * found.constant).sum(-1),
            cut=strings.cut,
        )

    def loss(self, outputs: Mapping[str, Tensor], draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        return self._insertions(_gaps(outputs, draw), draw, kernel) + self._deletions(outputs, draw) + draw.constant

    def _insertions(self, log_insert: Tensor, draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        total = torch.where(draw.attend, log_insert.exp().sum(-1), 0.0)
        index = draw.symbols[:, None].expand(-1, log_insert.shape[1], -1)
        said = log_insert.gather(-1, index).transpose(1, 2)
        linear = (draw.missing * said).sum((1, 2))
        if kernel.births:
            linear = linear + (draw.fresh * (log_insert @ kernel.law.to(log_insert))).sum(-1)
        return draw.weights[:, 0] * (total.sum(-1) - linear)

    def _deletions(self, outputs: Mapping[str, Tensor], draw: RatioDraw) -> Tensor:
        if "log_delete" not in outputs:
            return torch.zeros_like(draw.constant)
        token = draw.attend & (torch.arange(draw.attend.shape[1], device=draw.attend.device) > 0)
        said = outputs["log_delete"].float().masked_fill(~token, 0.0)
        return draw.weights[:, 1] * torch.where(token, said.exp() - draw.spurious * said, 0.0).sum(-1)


class DICE(DISE, kind="string_objective"):
    """Cross-entropy of insertions, for strings that all have one length, which is known (DID, arXiv 2603.23507).

    What is missing is then known in number, so the head's rates are scaled to it over the whole row: where and what is all
    that is learned. Rates do not depend on time. Use it with ``data.rows: stream``.
    """

    one_length = True

    class Config(StringConfig):
        pass

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, BirthDeath) and not kernel.births else ONLY_DELETES

    def loss(self, outputs: Mapping[str, Tensor], draw: RatioDraw, kernel: BirthDeath) -> Tensor:
        scaled = _scaled(_gaps(outputs, draw), draw.attend, draw.missing.sum((1, 2)))
        return self._insertions(scaled, draw, kernel) + draw.constant

    def rates(self, outputs: Mapping[str, Tensor], strings: Strings, longest: int) -> Mapping[str, Tensor]:
        left = (longest - strings.lengths).to(outputs["log_insert"].dtype)
        return {"log_insert": _scaled(outputs["log_insert"], strings.attend, left)}


def _scaled(log_insert: Tensor, attend: Tensor, total: Tensor) -> Tensor:
    """``log_insert`` [b, w, v] moved so that its exponentials sum to ``total`` [b] over the gaps of a row."""
    gaps = torch.where(attend, log_insert.logsumexp(-1), FLOOR)
    shift = total.clamp(min=1e-9).log() - gaps.logsumexp(-1)
    return log_insert + torch.where(total > 0, shift, FLOOR)[:, None, None]
