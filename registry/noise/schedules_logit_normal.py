"""Noise schedule of a rectified flow whose interpolation times have a logit-normal distribution.

The tensor ``t`` may have any shape, and results have the same shape.
"""

import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.schedule import Schedule

__all__ = ["LogitNormal"]


class LogitNormal(Schedule, kind="schedule"):
    """Schedule of ELF (arXiv 2605.10938): a rectified flow with a logit-normal distribution of its times.

    The flow is z = tau x_0 + (1 - tau) noise_scale noise, with tau = sigmoid(mean + std * normal). Divided by its length it is
    sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, with a log signal-to-noise ratio 2 (logit(tau) - log(noise_scale)), which
    is normal. Time t is 1 minus the quantile of tau, so uniform times give this distribution, cut off at both ends.
    """

    class Config(ComponentConfig):
        mean: Annotated[float, pydantic.Field(ge=-10, le=10)] = -1.5
        """Mean of logit(tau), from -10 to 10; -1.5 as published for unconditional text."""
        std: Annotated[float, pydantic.Field(ge=0.05, le=10)] = 0.8
        """Standard deviation of logit(tau), from 0.05 to 10."""
        noise_scale: Annotated[float, pydantic.Field(ge=0.01, le=100)] = 2.0
        """Standard deviation of the noise of the rectified flow, from 0.01 to 100."""
        cutoff: Annotated[float, pydantic.Field(ge=1e-9, le=0.1)] = 1e-5
        """Probability that is cut off at each end of the distribution of tau, from 1e-9 to 0.1."""

    config: Config

    def _gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma = -log(signal-to-noise ratio) and its derivative in t, float64."""
        config, cutoff = self.config, self.config.cutoff
        normal = torch.special.ndtri(cutoff + (1 - 2 * cutoff) * t.double())
        density = torch.exp(-normal.square() / 2) / math.sqrt(2 * math.pi)
        gamma = 2 * (math.log(config.noise_scale) - config.mean + config.std * normal)
        return gamma, 2 * config.std * (1 - 2 * cutoff) / density

    def sigma(self, t: Tensor) -> Tensor:
        return F.softplus(self._gamma(t)[0]).to(t.dtype)

    def dsigma(self, t: Tensor) -> Tensor:
        gamma, slope = self._gamma(t)
        return (torch.sigmoid(gamma) * slope).to(t.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        config, cutoff = self.config, self.config.cutoff
        gamma = torch.log(torch.expm1(sigma.double()))  # overflows far beyond the largest sigma, to a time of 1
        # the quantile is erfc(-normal / sqrt(2)) / 2
        scale, shift = -math.sqrt(0.5) / config.std, math.log(config.noise_scale) - config.mean
        quantile = torch.erfc(gamma * (scale / 2) - scale * shift)
        return ((quantile - 2 * cutoff) / (2 - 4 * cutoff)).clamp(0, 1).to(sigma.dtype)
