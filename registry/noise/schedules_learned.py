"""Noise schedule that is trained together with the network: a polynomial in the Bernstein basis.

Axes: k increments between consecutive Bernstein coefficients. The tensor ``t`` may have any shape.
"""

import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context

from .schedules import AlphaSchedule, Eps

__all__ = ["Learned"]

LEAST = 1e-2
"""Weight of the uniform distribution that is mixed into the increments of the Bernstein coefficients.

It makes sigma(t) strictly increasing in float32.
"""
GAIN = 10.0
"""Factor on the trained parameters before the softmax that gives the increments of the Bernstein coefficients.

Without it these few parameters would train more slowly than the network at the same learning rate.
"""


class Learned(AlphaSchedule, kind="schedule"):
    """Trained schedule, alpha(t) = 1 - (1 - eps) B(t) with a Bernstein polynomial B; initialised as ``loglinear``.

    The parameters are the increments between consecutive coefficients of B, which are positive and sum to 1. sigma(0)
    and sigma(1) are fixed, so the bound on -log p does not depend on the parameters; they are trained to minimise the
    variance of the loss (VDM, arXiv 2107.00630; :func:`sedd_graph.diffusion.tokens.schedule_loss.steadied`). Both alpha
    and 1 - alpha are sums of positive terms, so neither suffers from cancellation.
    """

    learned = True
    whole: Tensor
    slope: Tensor

    class Config(ComponentConfig):
        pieces: Annotated[int, pydantic.Field(ge=2, le=32)] = 8
        """Degree of the Bernstein polynomial, which is the number of trained increments; from 2 to 32."""
        eps: Eps = 1e-3
        """Value of alpha at t = 1, the probability that a token is still not noised at the end; in (0, 0.5)."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        pieces = self.config.pieces
        self.raw = torch.nn.Parameter(torch.zeros(pieces))
        for name, degree in (("whole", pieces), ("slope", pieces - 1)):
            binomials = torch.tensor([float(math.comb(degree, i)) for i in range(degree + 1)], dtype=torch.float64)
            self.register_buffer(name, binomials, persistent=False)

    def _increments(self, t: Tensor) -> Tensor:
        """Return the increments of the coefficients of B, [k], positive and of sum 1, in the dtype of ``t``."""
        return (1 - LEAST) * (GAIN * self.raw.to(t)).softmax(0) + LEAST / len(self.raw)

    @staticmethod
    def _bernstein(binomials: Tensor, weights: Tensor, t: Tensor) -> Tensor:
        """Return the Bernstein polynomial with coefficients ``weights``, evaluated at ``t`` of any shape."""
        power = torch.arange(len(binomials), device=t.device)
        terms = t[..., None] ** power * (1 - t)[..., None] ** power.flip(0)
        return (terms * (binomials.to(t) * weights)).sum(-1)

    def _complement(self, t: Tensor) -> Tensor:
        grown = torch.nn.functional.pad(self._increments(t).cumsum(0), (1, 0))
        return (1 - self.config.eps) * self._bernstein(self.whole, grown, t)

    def _alpha(self, t: Tensor) -> Tensor:
        ahead = torch.nn.functional.pad(self._increments(t).flip(0).cumsum(0).flip(0), (0, 1))
        return self.config.eps + (1 - self.config.eps) * self._bernstein(self.whole, ahead, t)

    def _decay(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * len(self.raw) * self._bernstein(self.slope, self._increments(t), t)
