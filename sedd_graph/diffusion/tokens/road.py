"""Roads of a noise tape: the text at which a sampling run is to end, and the rows that each step is to reach.

Axes: b batch, l length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["Bridge", "Road"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Road:
    """Text at which some positions are to end, whatever the noise on the tape.

    Attributes:
        text: Tokens, int64 [b, l].
        held: bool [b, l], positions that are to end at ``text``; the others are drawn with the noise of the tape.
    """

    text: Tensor
    held: Tensor


@dataclasses.dataclass(frozen=True)
class Bridge:
    """Draws of the rows after each step from the forward process, given the text and the rows before the step."""

    kernel: Kernel
    schedule: Schedule
    times: Sequence[float]
    road: Road
    generator: torch.Generator

    def rows(self, step: int, x: Tensor) -> Tensor:
        """Draw the rows after step ``step`` (from 0), int64 [b, l], given the rows ``x`` before it."""
        if step >= len(self.times) - 1:  # the last step ends at clean text
            return self.road.text
        now, below = (
            self.schedule.sigma(torch.full((len(x),), t, device=x.device).float()) for t in self.times[step : step + 2]
        )
        clean = torch.nn.functional.one_hot(self.road.text, self.kernel.states).float()
        chances = self.kernel.posterior(clean, x, now, below).clamp(min=0)
        stay = torch.nn.functional.one_hot(x, self.kernel.states).to(chances.dtype)
        return categorical(torch.where(chances.sum(-1, keepdim=True) > 0, chances, stay), generator=self.generator)
