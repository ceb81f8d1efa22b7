"""Objectives for strings: bounds on -log p under kernels that delete and insert tokens.

A draw, the noisy strings of a batch, also contains all terms of the loss that do not depend on the network, so that the
loss itself is a few sums and can be compiled. A gap is the place after a position, where tokens can be inserted. Axes:
b rows, w positions of a noisy string (the BOS token first), n tokens of a clean string, v data tokens.
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
    """Noisy strings of a batch under a birth-death kernel, with the regression targets of the network.

    The first four attributes are those of :class:`~sedd_graph.diffusion.strings.birth_death.Target`. Gap j is the place
    for insertions after position j of the noisy string. The target of inserting token v in gap j is the sum of two
    terms: ``missing[s, j]`` if v is the clean string's token ``symbols[s]``; and, if noise inserts tokens, ``fresh[j]``
    times the frequency of v among the tokens that noise inserts.

    Attributes:
        missing: float32 [b, n, w], the expected number of times that each token of ``symbols`` is missing in each gap.
        symbols: int64 [b, n], the distinct tokens of the clean string, padded to n.
        fresh: float32 [b, w], the coefficient of the token frequencies in each gap; 0 if noise does not insert.
        spurious: float32 [b, w], the probability that noise inserted the token at each position.
        weights: float32 [b, 2], weights of the loss terms of insertions and of deletions.
        constant: float32 [b], the terms of the loss that do not depend on the network, nats.
    """

    missing: Tensor
    symbols: Tensor
    fresh: Tensor
    spurious: Tensor
    weights: Tensor
    constant: Tensor


class NoiseLevel(NamedTuple):
    """Noise level of each row of a batch.

    Attributes:
        sigma: Total noise, [b].
        slope: Derivative of sigma, [b]: in training, d sigma / dt; in estimates of the bound, d sigma / du, where the
            kernel's method ``clock`` maps the uniform variable u to sigma.
        interval: Width of the interval from which training times t are drawn; the loss weights are multiplied by it. 1
            in training at given times; None in estimates of the bound.
    """

    sigma: Tensor
    slope: Tensor
    interval: float | None = None


class ClockObjective(StringObjective[Kernel_, Draw_]):
    """Base class of string objectives that train at uniform times t and integrate the bound over a variable u.

    In estimates of the bound, u is uniform in (0, 1), and the kernel's method ``clock`` gives total noise as a function
    of u, such that most draws have small noise.
    """

    abstract: ClassVar[bool] = True
    config: TimeConfig

    @abstractmethod
    def draw_at(self, batch: Batch, kernel: Kernel_, level: NoiseLevel, random: Randomness) -> Draw_:
        """Draw noisy strings at given noise levels, with the terms of the loss that do not depend on the network.

        In estimates of the bound (``level.interval`` is None), strings have any length, regression targets are exact,
        and loss weights have no upper limit.

        Args:
            batch: Clean rows.
            kernel: The forward process of a string.
            level: Noise level of each row.
            random: Source of random numbers.

        Returns:
            The draw, whose rows have w positions, the BOS token first.
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
    """Config keys of ``dise`` and ``dice``: training times, regression targets and the length of noisy strings."""

    targets: Literal["exact", "sampled"] = "exact"
    """Regression targets in training. ``exact``: ratios of transition probabilities given the clean string, by dynamic
    programming. ``sampled``: the deletions that were drawn, for the kernel ``delete`` only; unbiased and cheaper, with
    more variance."""
    room: Annotated[float, pydantic.Field(ge=1, le=64)] = 2.0
    """Largest length of noisy strings in training as a multiple of the length of clean rows, from 1 to 64, for a kernel
    that inserts. Tokens beyond the limit are dropped and counted. Evaluation of the bound uses whole strings."""


def _gaps(outputs: Mapping[str, Tensor], draw: StringDraw) -> Tensor:
    """Return ``log_insert``, float32 [b, w, v], 0 at padding, where its exponential could overflow."""
    return outputs["log_insert"].float().masked_fill(~draw.attend[..., None], 0.0)


class DISE(ClockObjective[BirthDeath, RatioDraw], kind="string_objective"):
    """Score entropy of strings, a bound on -log p of a string and its length, nats (DID, arXiv 2603.23507).

    The loss is the sum of q (s - R log s + R log R - R) over all edits of the reverse process: insertions, and
    deletions if the kernel inserts. Here q is the forward rate that the edit reverses, s the network's score, and R the
    score given the clean string: the ratio of the probabilities of the strings after and before the edit. Under the
    kernel ``indel`` the bound also includes the KL divergence of the noisiest strings from the prior.
    """

    Config: ClassVar[type[ComponentConfig]] = StringConfig
    config: StringConfig

    @property
    def training_excess(self) -> bool:
        return self.config.targets == "sampled"

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
    """Cross-entropy of insertions, a bound on -log p for strings of one known length, nats (DID, arXiv 2603.23507).

    The total number of missing tokens of a noisy string is known, so the network's insertion rates are normalised to
    sum to that number over the row, and the network learns only the positions and tokens of insertions. Its rates do
    not depend on time. The objective requires the blueprint setting ``data.rows: stream``, which cuts the text into
    rows of equal length.
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
