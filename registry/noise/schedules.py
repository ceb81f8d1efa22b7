"""Noise schedules: total noise sigma(t) and its derivative d sigma / dt, accurate in float32 near t = 0 and t = 1.

alpha(t) = exp(-sigma(t)) is the probability that a token is not yet noised (masked or replaced) at time t, which runs
from 0 (clean) to 1 (noise). Most schedules compute alpha and 1 - alpha by separate formulas, to avoid cancellation. The
tensor ``t`` may have any shape, and results have the same shape.
"""

import math
from abc import abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.numerics import tiny
from sedd_graph.diffusion.schedule import Schedule

__all__ = [
    "Cosine",
    "CosineSquared",
    "Cubic",
    "Geometric",
    "Linear",
    "LogLinear",
    "MD4Cosine",
    "MutualInformation",
    "Polynomial",
]

Eps = Annotated[float, pydantic.Field(gt=0, lt=0.5)]
Rate = Annotated[float, pydantic.Field(ge=0, le=1e4)]


class AlphaSchedule(Schedule):
    """Base class of schedules that are defined by alpha(t) = exp(-sigma(t)) rather than by total noise sigma(t)."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def _complement(self, t: Tensor) -> Tensor:
        """Return 1 - alpha(t), accurate where 1 - alpha is small; the shape of ``t``."""

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor:
        """Return alpha(t), accurate where alpha is small; the shape of ``t``."""

    @abstractmethod
    def _decay(self, t: Tensor) -> Tensor:
        """Return -d alpha / dt at times ``t``; the shape of ``t``."""

    def sigma(self, t: Tensor) -> Tensor:
        hit = self._complement(t)
        early = hit < 0.5
        return -torch.where(early, torch.log1p(-torch.where(early, hit, 0.0)), torch.log(self._alpha(t)))

    def dsigma(self, t: Tensor) -> Tensor:
        return self._decay(t) / self._alpha(t)


class LogLinear(AlphaSchedule, kind="schedule"):
    """Log-linear schedule, alpha(t) = 1 - (1 - eps) t: the share of noised tokens grows linearly in t (SEDD; MDLM).

    It is the continuous-time form of D3PM's beta_t = 1 / (T - t + 1) with T steps (arXiv 2107.03006).
    """

    class Config(ComponentConfig):
        eps: Eps = 1e-3
        """Value of alpha at t = 1, the probability that a token is still not noised at the end; in (0, 0.5)."""

    config: Config

    def _complement(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * t

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) + self.config.eps * t

    def _decay(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 - self.config.eps)

    def time(self, sigma: Tensor) -> Tensor:
        return (torch.expm1(-sigma) / (self.config.eps - 1)).clamp(0, 1)


class Geometric(Schedule, kind="schedule"):
    """Geometric schedule, sigma(t) = sigma_min^(1-t) sigma_max^t (SEDD, arXiv 2310.16834, for the uniform kernel).

    Total noise at t = 0 is ``sigma_min``, not 0.
    """

    class Config(ComponentConfig):
        sigma_min: Annotated[float, pydantic.Field(gt=0)] = 1e-4
        """Total noise at t = 0, above 0."""
        sigma_max: Annotated[float, pydantic.Field(gt=0, le=1e4)] = 20.0
        """Total noise at t = 1, above ``sigma_min`` and at most 1e4."""

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> "Geometric.Config":
            if self.sigma_min >= self.sigma_max:
                raise ValueError(f"sigma_min = {self.sigma_min:g} must be less than sigma_max = {self.sigma_max:g}")
            return self

    config: Config

    @property
    def _log_ratio(self) -> float:
        return math.log(self.config.sigma_max / self.config.sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return self.config.sigma_min * torch.exp(self._log_ratio * t)

    def dsigma(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self._log_ratio

    def time(self, sigma: Tensor) -> Tensor:
        return (torch.log(sigma / self.config.sigma_min) / self._log_ratio).clamp(0, 1)


class Linear(Schedule, kind="schedule"):
    """Schedule whose noise rate d sigma / dt is linear in t (the continuous-time limit of DDPM's linear betas).

    Total noise is sigma(t) = rate_min t + (rate_max - rate_min) t^2 / 2. The defaults approximate 1,000 steps of DDPM's
    beta from 1e-4 to 0.02, which ``linear_betas`` has exactly. If ``rate_min`` equals ``rate_max``, total noise is linear in t (``linear`` in MDLM's
    code).
    """

    class Config(ComponentConfig):
        rate_min: Rate = 0.1
        """Noise rate d sigma / dt at t = 0, in [0, 1e4]."""
        rate_max: Rate = 20.0
        """Noise rate d sigma / dt at t = 1, in (0, 1e4]."""

        @pydantic.model_validator(mode="after")
        def _moves(self) -> "Linear.Config":
            if self.rate_max <= 0:
                raise ValueError("rate_max must be above 0: at 0 no token is ever noised")
            return self

    config: Config

    def sigma(self, t: Tensor) -> Tensor:
        first, last = self.config.rate_min, self.config.rate_max
        return first * t * (1 - t / 2) + last * t.square() / 2

    def dsigma(self, t: Tensor) -> Tensor:
        return self.config.rate_min * (1 - t) + self.config.rate_max * t

    def time(self, sigma: Tensor) -> Tensor:
        # the root of a quadratic, in the form that does not cancel where sigma is small
        first, last = self.config.rate_min, self.config.rate_max
        root = (2 * (last - first) * sigma + first**2).clamp(min=0).sqrt()
        return (2 * sigma / (root + first).clamp(min=tiny(sigma))).clamp(0, 1)


class Cosine(AlphaSchedule, kind="schedule"):
    """Cosine schedule, alpha(t) = eps + (1 - eps) cos(a(t)) / cos(a(0)) (MDLM's code; D3PM with ``offset: 0.008``).

    The angle is a(t) = pi/2 (t + offset) / (1 + offset).
    """

    class Config(ComponentConfig):
        eps: Eps = 1e-3
        """Value of alpha at t = 1, the probability that a token is still not noised at the end; in (0, 0.5)."""
        offset: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
        """Offset added to t in the angle of the cosine, in [0, 1]; 0.008 in D3PM. If above 0, the noise rate at t = 0
        is positive."""

    config: Config

    @property
    def _frequency(self) -> float:
        return math.pi / 2 / (1 + self.config.offset)

    @property
    def _scale(self) -> float:
        return (1 - self.config.eps) / math.cos(self._frequency * self.config.offset)

    def _complement(self, t: Tensor) -> Tensor:
        # cos a_0 - cos a as a product
        half = self._frequency * t / 2
        return 2 * self._scale * torch.sin(half + self._frequency * self.config.offset) * torch.sin(half)

    def _alpha(self, t: Tensor) -> Tensor:
        return self.config.eps + self._scale * torch.sin(self._frequency * (1 - t))

    def _decay(self, t: Tensor) -> Tensor:
        return self._scale * self._frequency * torch.sin(self._frequency * (t + self.config.offset))

    def time(self, sigma: Tensor) -> Tensor:
        # sin^2(a/2) = sin^2(a_0/2) + (1 - alpha) / (2 scale): a sum of positive terms
        start = math.sin(self._frequency * self.config.offset / 2) ** 2
        square = torch.expm1(-sigma) * (-0.5 / self._scale) + start
        return (torch.asin(square.sqrt()) * (2 / self._frequency) - self.config.offset).clamp(0, 1)


class CosineSquared(AlphaSchedule, kind="schedule"):
    """Squared-cosine schedule, alpha(t) = eps + (1 - eps) cos^2(pi t / 2) (arXiv 2102.09672; MDLM's code)."""

    class Config(ComponentConfig):
        eps: Eps = 1e-3
        """Value of alpha at t = 1, the probability that a token is still not noised at the end; in (0, 0.5)."""

    config: Config

    def _complement(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * torch.sin(math.pi / 2 * t).square()

    def _alpha(self, t: Tensor) -> Tensor:
        return self.config.eps + (1 - self.config.eps) * torch.sin(math.pi / 2 * (1 - t)).square()

    def _decay(self, t: Tensor) -> Tensor:
        # sin(pi t) as a product, which is not below 0 at t = 1 in float32
        return math.pi * (1 - self.config.eps) * torch.sin(math.pi / 2 * t) * torch.sin(math.pi / 2 * (1 - t))

    def time(self, sigma: Tensor) -> Tensor:
        # the angle of sine and cosine, of which one is accurate at each end
        log_alpha = -sigma
        cosine = (torch.exp(log_alpha) - self.config.eps).clamp(min=0).sqrt()
        return torch.atan2((-torch.expm1(log_alpha)).sqrt(), cosine) * (2 / math.pi)


class MD4Cosine(AlphaSchedule, kind="schedule"):
    """Cosine schedule of MD4, alpha(t) = eps + (1 - 2 eps) (1 - cos(pi/2 (1 - t))) (arXiv 2406.04329, table 4).

    Total noise at t = 0 is about ``eps``, not 0.
    """

    class Config(ComponentConfig):
        eps: Eps = 1e-4
        """Value of 1 - alpha at t = 0 and of alpha at t = 1; in (0, 0.5)."""

    config: Config

    def _complement(self, t: Tensor) -> Tensor:
        return self.config.eps + (1 - 2 * self.config.eps) * torch.sin(math.pi / 2 * t)

    def _alpha(self, t: Tensor) -> Tensor:
        return self.config.eps + 2 * (1 - 2 * self.config.eps) * torch.sin(math.pi / 4 * (1 - t)).square()

    def _decay(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (1 - 2 * self.config.eps) * torch.sin(math.pi / 2 * (1 - t))

    def time(self, sigma: Tensor) -> Tensor:
        square = (torch.exp(-sigma) - self.config.eps) * (0.5 / (1 - 2 * self.config.eps))
        return (1 - torch.asin(square.clamp(0, 0.5).sqrt()) * (4 / math.pi)).clamp(min=0)


class Polynomial(AlphaSchedule, kind="schedule"):
    """Polynomial schedule, alpha(t) = 1 - (1 - eps) t^power (MD4, arXiv 2406.04329; ``eps`` makes sigma(1) finite)."""

    class Config(ComponentConfig):
        power: Annotated[float, pydantic.Field(ge=0.1, le=10)] = 2.0
        """Exponent of t, in [0.1, 10]; 1 gives the schedule ``loglinear``."""
        eps: Eps = 1e-3
        """Value of alpha at t = 1, the probability that a token is still not noised at the end; in (0, 0.5)."""

    config: Config

    def _complement(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * t.pow(self.config.power)

    def _alpha(self, t: Tensor) -> Tensor:
        return self.config.eps * t.pow(self.config.power) - torch.expm1(self.config.power * torch.log(t))

    def _decay(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * self.config.power * t.pow(self.config.power - 1)

    def time(self, sigma: Tensor) -> Tensor:
        return (torch.expm1(-sigma) / (self.config.eps - 1)).pow(1 / self.config.power).clamp(0, 1)


class Cubic(AlphaSchedule, kind="schedule"):
    """Cubic schedule, alpha(t) = eps + (1 - eps) (1 - t)^3 (Edit Flows, arXiv 2506.09018).

    The paper's kappa is the cube of the paper's time, which is 1 - t here.
    """

    class Config(ComponentConfig):
        eps: Eps = 1e-3
        """Value of alpha at t = 1, the probability that a token is still not noised at the end; in (0, 0.5)."""

    config: Config

    def _complement(self, t: Tensor) -> Tensor:
        return (1 - self.config.eps) * t * (3 - t * (3 - t))

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t).pow(3) + self.config.eps * t * (3 - t * (3 - t))

    def _decay(self, t: Tensor) -> Tensor:
        return 3 * (1 - self.config.eps) * (1 - t).square()

    def time(self, sigma: Tensor) -> Tensor:
        # 1 - (1 - x)^(1/3), accurate where x is small
        share = (torch.expm1(-sigma) / (1 - self.config.eps)).clamp(min=-1)
        return -torch.expm1(torch.log1p(share) / 3)


class MutualInformation(Schedule, kind="schedule"):
    """Schedule under which the mutual information of x_t and x_0 falls linearly in t (D3PM).

    The formula is from arXiv 2107.03006, section 3.3. The mutual information is computed for the ``uniform`` kernel and
    for tokens of equal frequency. For the ``absorb`` kernel the schedule ``loglinear`` has this property, whatever the
    token frequencies.
    """

    class Config(ComponentConfig):
        eps: Annotated[float, pydantic.Field(gt=0, le=1e-2)] = 1e-6
        """Share of the mutual information that remains at t = 1, in (0, 0.01]."""

    config: Config

    def _lost(self, sigma: Tensor) -> Tensor:
        """Return the share of mutual information lost at ``sigma``, float64."""
        n = self.axis("n")
        other = -torch.expm1(-sigma) / n
        same = torch.exp(-sigma) + other
        return -(torch.xlogy(same, same) + (n - 1) * torch.xlogy(other, other)) / math.log(n)

    def _slope(self, sigma: Tensor) -> Tensor:
        """Return the derivative of :meth:`_lost` in ``sigma``, float64."""
        n = self.axis("n")
        alpha, other = torch.exp(-sigma), -torch.expm1(-sigma) / n
        # log(same / other) = log1p(alpha / other)
        return alpha * (n - 1) / n * torch.log1p(alpha / other) / math.log(n)

    def sigma(self, t: Tensor) -> Tensor:
        wanted = (1 - self.config.eps) * t.double()
        low, high = torch.full_like(wanted, math.log(1e-12)), torch.full_like(wanted, math.log(40.0))
        for _ in range(60):  # bisection in log sigma, to the last bits: 52 / 2^60
            middle = (low + high) / 2
            above = self._lost(middle.exp()) > wanted
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).exp().to(t.dtype)

    def dsigma(self, t: Tensor) -> Tensor:
        return ((1 - self.config.eps) / self._slope(self.sigma(t.double()))).to(t.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        n = self.axis("n")
        changed = torch.expm1(-sigma)
        same, other = changed * (1 - 1 / n) + 1, changed * (-1 / n)
        kept = torch.xlogy(same, same).add(torch.xlogy(other, other), alpha=n - 1)
        return (kept / (-math.log(n) * (1 - self.config.eps))).clamp(0, 1)
