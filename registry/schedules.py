"""Noise schedules: total noise sigma(t) and its derivative, in forms that hold in float32 near t = 0 and t = 1.

alpha = exp(-sigma) is the chance that a token has not been hit by time t.
"""

import math
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.component import ComponentConfig
from sedd_graph.diffusion.process import Schedule

Eps = Annotated[float, pydantic.Field(gt=0, lt=0.5)]


class LogLinear(Schedule, kind="schedule"):
    """alpha = 1 - (1 - eps) t: as many tokens are hit in each stretch of time (SEDD; MDLM)."""

    class Config(ComponentConfig):
        eps: Eps = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.config.eps) * t)

    def dsigma(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) / (1 - (1 - self.config.eps) * t)


class Geometric(Schedule, kind="schedule"):
    """sigma = sigma_min^(1-t) sigma_max^t (SEDD's schedule for the uniform kernel). sigma(0) is sigma_min, not 0."""

    class Config(ComponentConfig):
        sigma_min: Annotated[float, pydantic.Field(gt=0)] = 1e-4
        sigma_max: Annotated[float, pydantic.Field(gt=0, le=1e4)] = 20.0

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> "Geometric.Config":
            if self.sigma_min >= self.sigma_max:
                raise ValueError(f"sigma_min = {self.sigma_min:g} must be less than sigma_max = {self.sigma_max:g}")
            return self

    @property
    def _log_ratio(self) -> float:
        return math.log(self.config.sigma_max / self.config.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.config.sigma_min * torch.exp(self._log_ratio * t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self._log_ratio


class Cosine(Schedule, kind="schedule"):
    """alpha = eps + (1 - eps) cos(pi t / 2) (MDLM code)."""

    class Config(ComponentConfig):
        eps: Eps = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        # two forms of one function: neither 1 - alpha near t = 0 nor alpha near t = 1 is a small difference
        early = torch.log1p(-2 * (1 - self.config.eps) * torch.sin(math.pi * t / 4).square())
        return -torch.where(t < 0.5, early, torch.log(self._alpha(t)))

    def _alpha(self, t: Tensor) -> Tensor:
        return self.config.eps + (1 - self.config.eps) * torch.sin(math.pi / 2 * (1 - t))

    def dsigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (1 - self.config.eps) * torch.sin(math.pi * t / 2) / self._alpha(t)


class Polynomial(Schedule, kind="schedule"):
    """alpha = 1 - (1 - eps) t^power (MD4, arXiv 2406.04329, with an end that stays finite)."""

    class Config(ComponentConfig):
        power: Annotated[float, pydantic.Field(ge=0.1, le=10)] = 2.0
        eps: Eps = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.config.eps) * t.pow(self.config.power))

    def dsigma(self, t: Tensor) -> Tensor:
        w, left = self.config.power, 1 - self.config.eps
        return left * w * t.pow(w - 1) / (1 - left * t.pow(w))
