"""Coupled draws and divergences of strings whose tokens noise deletes, for distillation.

x_s is drawn given x_0 by deletion, and x_t given x_s by more of it. A network predicts the expected number of times that each
token is missing in each gap. The expectations at x_s give those at x_t: what is missing in a gap of x_t is what is missing in
the gaps of x_s that it joins, and the tokens of x_s that were deleted in between.

Axes: b rows, w positions of a noisy string (the BOS token first), v data tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.distillation import LEAST, Direction, Distillable, Outputs, Pair
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.birth_death import BirthDeath
from sedd_graph.diffusion.strings.kernel import StringDraw, StringObjective
from sedd_graph.diffusion.strings.strings import Strings

__all__ = ["DeletionDistillable", "Joined"]


class Joined(NamedTuple):
    """Where the positions of x_s are in x_t.

    Attributes:
        gap: Gap of x_t that the gap behind each position of x_s became part of, int64 [b, w_s].
        deleted: True at the tokens of x_s that are missing in x_t, bool [b, w_s]; they are missing in the same gap.
    """

    gap: Tensor
    deleted: Tensor


class DeletionDistillable(Distillable):
    """Coupled draws and divergences of a process that deletes tokens.

    Args:
        kernel: The kernel, without births.
        schedule: Total noise as a function of time.
        objective: The objective, which converts outputs to expected numbers of missing tokens.
    """

    def __init__(self, kernel: BirthDeath, schedule: Schedule, objective: StringObjective[Any, Any]) -> None:
        self.kernel, self.schedule, self.objective = kernel, schedule, objective

    def times(self, batch: Batch, random: Randomness) -> Tensor:
        return random.low_discrepancy(len(batch)).to(batch.tokens.device)

    def pair(self, batch: Batch, s: Tensor, t: Tensor, random: Randomness) -> Pair:
        below, sigma = self.schedule.sigma(s), self.schedule.sigma(t)
        lower = self.kernel.sample(batch, below, random=random, width=batch.width + 1)
        tokens, real = lower.tokens[:, 1:], lower.attend[:, 1:]
        pinned = (batch.attend & ~batch.corrupt)[:, : tokens.shape[1]]  # a prompt is first in x_s, too
        free = real & ~F.pad(pinned, (0, tokens.shape[1] - pinned.shape[1]))
        upper = self.kernel.sample(Batch(tokens, real, free, free), sigma - below, random=random, width=batch.width + 1)
        if upper.kept is None:
            raise TypeError("strings of a kernel without births know which tokens were kept")
        gap = F.pad(upper.kept.long().cumsum(1), (1, 0))
        deleted = F.pad(real & ~upper.kept, (1, 0))
        return Pair(_draw(lower, below), _draw(upper, sigma), Joined(gap, deleted))

    def run(self, model: Any, draw: StringDraw, batch: Batch, key: Tensor | None) -> tuple[Outputs, dict[str, Tensor]]:
        found: tuple[Outputs, dict[str, Tensor]] = model.run(
            {"tokens": draw.xt, "sigma": draw.sigma, "attend": draw.attend}, key
        )
        return found

    def _log_missing(self, outputs: Outputs, draw: StringDraw, batch: Batch) -> Tensor:
        """Return the log of the expected number of times that each token is missing in each gap, float32 [b, w, v]."""
        strings = Strings(draw.xt, draw.attend)
        found: Mapping[str, Tensor] = self.objective.rates(outputs, strings, batch.width)
        return found["log_insert"].float().masked_fill(~draw.attend[..., None], 0.0)

    def target(self, teacher: Outputs, pair: Pair, batch: Batch, *, seen: bool) -> Tensor:
        """Return the expected number of times that each token is missing in each gap of x_t, by the teacher at x_s.

        Both forms have the same mean over x_s given x_t.

        Args:
            teacher: The teacher's outputs at x_s.
            pair: The coupled draws.
            batch: The clean rows.
            seen: True to add the tokens of x_s that are missing in x_t to what the teacher predicts; False to divide what
                it predicts by the probability that a token that is missing in x_t is missing in x_s.

        Returns:
            float32 [b, w_t, v].
        """
        lower, upper, link = pair.lower, pair.upper, pair.link
        each: Tensor = self._log_missing(teacher, lower, batch).exp() * lower.attend[..., None]
        if seen:
            token = lower.xt.clamp(max=each.shape[-1] - 1)[..., None]
            each = each.scatter_add(-1, token, link.deleted[..., None].float())
        else:
            each = each / _earlier(pair)[:, None, None]
        out = each.new_zeros(len(each), upper.xt.shape[1], each.shape[-1])
        return out.scatter_add(1, link.gap[..., None].expand_as(each), each)

    def divergence(self, student: Outputs, teacher: Outputs, pair: Pair, batch: Batch, direction: Direction) -> Tensor:
        with full_precision(pair.upper.xt):
            log_r = self._log_missing(student, pair.upper, batch)
            forward = direction == "forward"
            # a geometric mean over x_s, where the reverse divergence is least, may have no 0 and 1 that x_s alone decides
            a = self.target(teacher, pair, batch, seen=forward).detach().clamp(min=LEAST)
            gap, log_a = log_r.exp() - a, a.log()
            nats = a * (log_a - log_r) + gap if forward else log_r.exp() * (log_r - log_a) - gap
            total = torch.where(pair.upper.attend, nats.sum(-1), 0.0).sum(-1)
            found: Tensor = total / -torch.expm1(-pair.upper.sigma)
            return found if forward else found * _earlier(pair)


def _earlier(pair: Pair) -> Tensor:
    """Return the probability that a token that is missing in x_t is missing in x_s, float32 [b]."""
    found: Tensor = torch.expm1(-pair.lower.sigma) / torch.expm1(-pair.upper.sigma)
    return found


def _draw(strings: Strings, sigma: Tensor) -> StringDraw:
    return StringDraw(strings.tokens, strings.attend, sigma.float())
