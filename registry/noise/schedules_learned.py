"""A schedule whose pace is learned with the network. Axes: b rows, k pieces."""

import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context

from .schedules import Ends, Eps

__all__ = ["Learned"]

LEAST = 1e-2
"""The share of an even pace that no parameters take away: noise grows at all times, in float32 too."""
GAIN = 10.0
"""Of parameters: at learning rates that suit a network, a few numbers would take longer to learn than it does."""


class Learned(Ends, kind="schedule"):
    """alpha = 1 - (1 - eps) B(t), B a Bernstein polynomial with positive increments that are learned; ``loglinear`` at first.

    Both ends are fixed, so that the bound is the same for any of them; what is learned is the pace of least variance (VDM, arXiv
    2107.00630; :func:`sedd_graph.diffusion.tokens.schedule_loss.steadied`). Every sum is of positive terms: nothing cancels at either
    end.
    """

    learned = True
    whole: Tensor
    slope: Tensor

    class Config(ComponentConfig):
        pieces: Annotated[int, pydantic.Field(ge=2, le=32)] = 8
        """How many increments: the degree of the polynomial."""
        eps: Eps = 1e-3

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        pieces = self.config.pieces
        self.raw = torch.nn.Parameter(torch.zeros(pieces))
        for name, degree in (("whole", pieces), ("slope", pieces - 1)):
            ways = torch.tensor([float(math.comb(degree, i)) for i in range(degree + 1)], dtype=torch.float64)
            self.register_buffer(name, ways, persistent=False)

    def _increments(self, t: Tensor) -> Tensor:
        """float [k], positive, of sum 1."""
        return (1 - LEAST) * (GAIN * self.raw.to(t)).softmax(0) + LEAST / len(self.raw)

    @staticmethod
    def _sum(ways: Tensor, weights: Tensor, t: Tensor) -> Tensor:
        """The Bernstein polynomial with coefficients ``weights``, at ``t`` of any shape."""
        power = torch.arange(len(ways), device=t.device)
        terms = t[..., None] ** power * (1 - t)[..., None] ** power.flip(0)
        return (terms * (ways.to(t) * weights)).sum(-1)

    def _hit(self, t: Tensor) -> Tensor:
        grown = torch.nn.functional.pad(self._increments(t).cumsum(0), (1, 0))
        return (1 - self.config.eps) * self._sum(self.whole, grown, t)

    def _left(self, t: Tensor) -> Tensor:
        ahead = torch.nn.functional.pad(self._increments(t).flip(0).cumsum(0).flip(0), (0, 1))
        return self.config.eps + (1 - self.config.eps) * self._sum(self.whole, ahead, t)

    def _pace(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * len(self.raw) * self._sum(self.slope, self._increments(t), t)
