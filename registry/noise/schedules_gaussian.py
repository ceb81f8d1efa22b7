"""Noise schedule in steps: the betas of the Diffusion-LM code, as total noise in continuous time."""

import math
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.diffusion.schedule import Schedule

__all__ = ["Stepwise"]

Form = Literal["sqrt", "linear", "cosine", "trunc_cos", "trunc_lin"]
MAX_BETA = 0.999
"""Largest beta of a step, as in the published code."""


def betas(form: Form, steps: int) -> np.ndarray:
    """Return beta_1 to beta_T of a named schedule, float64 [steps].

    beta_i = 1 - alpha_bar_i / alpha_bar_{i-1} is the variance of the noise of step i (``get_named_beta_schedule`` of the
    Diffusion-LM code, from improved DDPM, arXiv 2102.09672).

    Args:
        form: Name of the schedule.
        steps: Number of steps T.
    """
    if form in ("linear", "trunc_lin"):
        scale, offset = 1000 / steps, 0.01 if form == "trunc_lin" else 0.0
        last = scale * 0.02 + offset
        if form == "trunc_lin" and last > 1:
            last = scale * 0.001 + offset
        return np.linspace(scale * 0.0001 + offset, last, steps, dtype=np.float64)
    at = np.arange(steps + 1, dtype=np.float64) / steps
    if form == "sqrt":
        level = 1 - np.sqrt(at + 0.0001)
    elif form == "cosine":
        level = np.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
    else:
        level = np.cos((at + 0.1) / 1.1 * math.pi / 2) ** 2
    found = np.minimum(1 - level[1:] / level[:-1], MAX_BETA)
    if form == "trunc_cos":  # the first step has the noise that the level begins with
        found = np.concatenate([[min(1 - level[0], MAX_BETA)], found[:-1]])
    return found


class Stepwise(Schedule, kind="schedule"):
    """Schedule of Diffusion-LM (arXiv 2205.14217) in steps of given betas; total noise is linear within a step.

    At t = i / steps, alpha_bar = exp(-sigma) is the product of 1 - beta over the steps up to i.
    """

    rates: Tensor
    levels: Tensor

    class Config(ComponentConfig):
        form: Form = "sqrt"
        """Form of the betas. ``sqrt``: alpha_bar = 1 - sqrt(t + 1e-4), of Diffusion-LM; ``linear``: DDPM; ``cosine``:
        improved DDPM; ``trunc_cos`` and ``trunc_lin``: cosine and linear with noise from the first step on."""
        steps: Annotated[int, pydantic.Field(ge=2, le=1_000_000)] = 2000
        """Number of steps, from 2 to 1,000,000; that of the kernel, if it has steps."""

        @pydantic.model_validator(mode="after")
        def _betas_below_one(self) -> "Stepwise.Config":
            if not float(betas(self.form, self.steps).max()) < 1:
                raise ValueError(
                    f"{self.form} needs more than {self.steps} steps: a step would have a beta of 1 or more"
                )
            return self

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        steps = -np.log1p(-betas(self.config.form, self.config.steps))
        levels = np.concatenate([[0.0], steps.cumsum()])
        self.register_buffer("rates", torch.from_numpy(steps * self.config.steps), persistent=False)
        self.register_buffer("levels", torch.from_numpy(levels), persistent=False)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step of times ``t``, from 0, and the share of it that has passed."""
        # float64 whatever the dtype of ``t``, so that a time at the border of two steps is in the same one
        scaled = t.double() * self.config.steps
        near = scaled.round()
        snapped = torch.where((scaled - near).abs() < 1e-12 * self.config.steps, near, scaled)
        index = (snapped.ceil().long() - 1).clamp(0, self.config.steps - 1)
        return index, scaled - index

    def sigma(self, t: Tensor) -> Tensor:
        index, share = self._place(t)
        return (self.levels[index] + share * self.rates[index] / self.config.steps).to(t.dtype)

    def dsigma(self, t: Tensor) -> Tensor:
        return self.rates[self._place(t)[0]].to(t.dtype)

    def time(self, sigma: Tensor) -> Tensor:
        given = sigma.double()
        index = (torch.searchsorted(self.levels, given.contiguous()) - 1).clamp(0, self.config.steps - 1)
        share = (given - self.levels[index]) * self.config.steps / self.rates[index]
        return ((index + share) / self.config.steps).clamp(0, 1).to(sigma.dtype)
