"""Noise schedules given step by step: ``betas``, ``linear_betas``, and ``steps_taken`` for kernels in discrete time.

The tensor ``t`` may have any shape, and results have the same shape.
"""

import functools
from abc import abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.schedule import Schedule

from ._betas import MOST_STEPS, StepCount, linear_betas

__all__ = ["BetaSchedule", "Betas", "LinearBetas", "StepsTaken"]

Beta = Annotated[float, pydantic.Field(gt=0, le=1)]
Largest = Annotated[float, pydantic.Field(gt=0, le=1 - 1e-12)]


class BetaSchedule(Schedule):
    """Base class of schedules with alpha(i / T) = (1 - beta_1) ... (1 - beta_i), as in D3PM with T steps.

    Total noise is linear in t between the steps, so that any objective and sampler can use them.
    """

    abstract: ClassVar[bool] = True

    @abstractmethod
    def betas(self) -> Tensor:
        """Return the probability with which each step noises a token, float64 [T], in (0, 1)."""

    @functools.cached_property
    def _levels(self) -> tuple[Tensor, Tensor]:
        """Total noise before each step, and the total noise that it adds, float64 [T] each."""
        rises = -torch.log1p(-self.betas())
        return rises.cumsum(0) - rises, rises

    def levels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return total noise before each step, and the total noise that it adds, float64 [T] each, copied once per device."""
        found: dict[torch.device, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_copies", {})
        if device not in found:
            before, rises = self._levels
            found[device] = before.to(device), rises.to(device)
        return found[device]

    def time(self, sigma: Tensor) -> Tensor:
        before, rises = self.levels(sigma.device)
        level = sigma.double()
        step = torch.searchsorted(before[1:], level)
        return (((level - before[step]) / rises[step] + step) / len(rises)).clamp(0, 1).to(sigma.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        before, rises = self.levels(t.device)
        place = t.double() * len(rises)
        # a float32 time i / T is off by its rounding, which the noise of a steep step would magnify
        whole = place.round()
        place = torch.where((place - whole).abs() <= torch.finfo(t.dtype).eps * whole, whole, place)
        step = place.long().clamp(0, len(rises) - 1)
        return (before[step] + (place - step) * rises[step]).to(t.dtype)

    def dsigma(self, t: Tensor) -> Tensor:
        rises = self.levels(t.device)[1]
        step = (t.double() * len(rises)).long().clamp(0, len(rises) - 1)
        return (len(rises) * rises[step]).to(t.dtype)


class Betas(BetaSchedule, kind="schedule"):
    """Schedule given by a list of betas, one for each of T steps of equal length in t (D3PM, arXiv 2107.03006).

    Step i noises a token with probability beta_i, whatever the step before did: alpha(i / T) is the product of 1 - beta
    over the first i steps.
    """

    example: ClassVar = {"values": [0.1, 0.2, 0.4, 0.8, 0.999]}

    class Config(ComponentConfig):
        values: Annotated[tuple[Beta, ...], pydantic.Field(min_length=1, max_length=MOST_STEPS)]
        """The betas of all steps, each in (0, 1], 1 to 10,000 of them."""
        largest: Largest = 0.999
        """Upper limit of the betas: larger ones are reduced to it, so that total noise is finite; below 1. D3PM's code
        has 0.999."""

    config: Config

    def betas(self) -> Tensor:
        return torch.tensor(self.config.values, dtype=torch.float64).clamp(max=self.config.largest)


class LinearBetas(BetaSchedule, kind="schedule"):
    """Schedule with betas that are linear in the step, ``linspace(beta_first, beta_last, steps)`` (DDPM; D3PM).

    alpha(i / T) is the product of 1 - beta over the first i of T steps. (``linear_rate`` has a noise rate that is
    linear in t instead, so that its betas are only approximately linear.)
    """

    class Config(ComponentConfig):
        steps: StepCount = 1000
        """Number of steps T, from 1 to 10,000."""
        beta_first: Beta = 1e-4
        """Beta of the first step, in (0, 1]."""
        beta_last: Beta = 0.02
        """Beta of the last step, in (0, 1]."""
        end: bool = True
        """True: the last step has ``beta_last``, as in D3PM's code for images. False: the step after the last would
        have it, as in D3PM's code for text."""
        largest: Largest = 0.999
        """Upper limit of the betas: larger ones are reduced to it, so that total noise is finite; below 1."""

    config: Config

    def betas(self) -> Tensor:
        config = self.config
        found = linear_betas(config.beta_first, config.beta_last, config.steps, end=config.end)
        return found.clamp(max=config.largest)


class StepsTaken(Schedule, kind="schedule"):
    """Schedule of kernels in discrete time, such as ``steps``: total noise is the number of steps taken, T times t.

    Such a kernel has this schedule without declaring it.
    """

    class Config(ComponentConfig):
        steps: StepCount = 1000
        """Number of steps T of the kernel, from 1 to 10,000."""

    config: Config

    def sigma(self, t: Tensor) -> Tensor:
        return self.config.steps * t

    def dsigma(self, t: Tensor) -> Tensor:
        return torch.full_like(t, float(self.config.steps))

    def time(self, sigma: Tensor) -> Tensor:
        return (sigma / self.config.steps).clamp(0, 1)
