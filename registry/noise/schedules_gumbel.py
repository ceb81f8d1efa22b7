"""Noise schedule whose log noise-to-signal ratio has a Gumbel distribution, fitted to the entropy of the tokens.

The tensor ``t`` may have any shape, and results have the same shape.
"""

import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.numerics import log_expm1
from sedd_graph.diffusion.schedule import FittedSchedule

__all__ = ["Gumbel"]

GAIN = 10.0
"""Factor on the trained parameters. Without it these three would train more slowly than the curve moves that they fit."""


class Gumbel(FittedSchedule, kind="schedule"):
    """Schedule of LangFlow (arXiv 2604.11748): uniform times give Gumbel-distributed log noise-to-signal ratios gamma.

    gamma(t) = log((1 - alpha_bar) / alpha_bar) is the quantile function of a Gumbel distribution at cutoff + (1 - 2 cutoff) t,
    so the distribution is truncated to its quantiles ``cutoff`` and 1 - ``cutoff``; total noise is log(1 + exp(gamma)). Location
    and scale are trained: entropy * CDF(gamma) is fitted by least squares to the cross-entropy per token at gamma. Then each
    interval of time of equal length removes as much of the entropy of the tokens ("information-uniform").
    """

    learned = True

    class Config(ComponentConfig):
        location: Annotated[float, pydantic.Field(ge=-20, le=20)] = 4.72
        """Initial location of the distribution of gamma, from -20 to 20. 4.72 is that of the published models, whose vectors
        are 768 wide; narrower vectors need less noise, by about log(768 / width)."""
        scale: Annotated[float, pydantic.Field(ge=0.05, le=20)] = 0.85
        """Initial scale of the distribution of gamma, from 0.05 to 20."""
        entropy: Annotated[float, pydantic.Field(gt=0, le=20)] = 7.02
        """Initial value of the fitted cross-entropy at the highest noise, nats per token: the entropy of the tokens'
        frequencies; at most 20."""
        cutoff: Annotated[float, pydantic.Field(ge=1e-9, le=0.1)] = 1e-5
        """Probability that is cut off at each end of the distribution of gamma, from 1e-9 to 0.1."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.raw = nn.Parameter(torch.zeros(3))

    def fitted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return location, scale and entropy, each a scalar float64 tensor with gradients."""
        location, scale, entropy = (GAIN * self.raw.double()).unbind()
        config = self.config
        return config.location + location, config.scale * torch.exp(scale), config.entropy * torch.exp(entropy)

    def _gamma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return gamma and its derivative in t at times ``t``, float64, without gradients to the parameters."""
        location, scale, _ = (value.detach() for value in self.fitted())
        cutoff = self.config.cutoff
        rest = (1 - cutoff) - (1 - 2 * cutoff) * t.double()  # 1 - quantile, accurate where it is small
        log_quantile = torch.log1p(-rest)
        slope = scale * (1 - 2 * cutoff) / (-(1 - rest) * log_quantile)
        return location - scale * torch.log(-log_quantile), slope

    def sigma(self, t: Tensor) -> Tensor:
        return F.softplus(self._gamma(t)[0]).to(t.dtype)

    def dsigma(self, t: Tensor) -> Tensor:
        gamma, slope = self._gamma(t)
        return (torch.sigmoid(gamma) * slope).to(t.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        location, scale, _ = (value.detach() for value in self.fitted())
        cutoff, given = self.config.cutoff, sigma.double().clamp(min=1e-300)
        rest = -torch.expm1(-torch.exp((location - log_expm1(given)) / scale))
        return (((1 - cutoff) - rest) / (1 - 2 * cutoff)).clamp(0, 1).to(sigma.dtype)

    def fit(self, sigma: Tensor, nats: Tensor) -> Tensor:
        location, scale, entropy = self.fitted()
        gamma = log_expm1(sigma.detach().double())
        cdf = torch.exp(-torch.exp(((location - gamma) / scale).clamp(max=math.log(700.0))))
        return (entropy * cdf - nats.detach().double()).square()
