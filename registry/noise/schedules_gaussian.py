"""Noise schedule in steps: the betas of the Diffusion-LM code, as total noise in continuous time."""

import math
from typing import Annotated, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig

from ._betas import MOST_STEPS
from .schedules_steps import BetaSchedule

__all__ = ["Stepwise", "named_betas"]

Form = Literal["sqrt", "linear", "cosine", "trunc_cos", "trunc_lin"]
MAX_BETA = 0.999
"""Largest beta of a step, as in the published code."""


def named_betas(form: Form, steps: int) -> np.ndarray:
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


class Stepwise(BetaSchedule, kind="schedule"):
    """Schedule of Diffusion-LM (arXiv 2205.14217) in steps of given betas; total noise is linear within a step.

    At t = i / steps, alpha_bar = exp(-sigma) is the product of 1 - beta over the steps up to i.
    """

    class Config(ComponentConfig):
        form: Form = "sqrt"
        """Form of the betas. ``sqrt``: alpha_bar = 1 - sqrt(t + 1e-4), of Diffusion-LM; ``linear``: DDPM; ``cosine``:
        improved DDPM; ``trunc_cos`` and ``trunc_lin``: cosine and linear with noise from the first step on."""
        steps: Annotated[int, pydantic.Field(ge=2, le=MOST_STEPS)] = 2000
        """Number of steps, from 2 to 10,000; that of the kernel, if it has steps."""

        @pydantic.model_validator(mode="after")
        def _betas_below_one(self) -> "Stepwise.Config":
            if not float(named_betas(self.form, self.steps).max()) < 1:
                raise ValueError(
                    f"{self.form} needs more than {self.steps} steps: a step would have a beta of 1 or more"
                )
            return self

    config: Config

    def betas(self) -> Tensor:
        return torch.from_numpy(named_betas(self.config.form, self.config.steps))

    def sigma(self, t: Tensor) -> Tensor:
        before, rises = self.levels(t.device)
        place = t.double() * len(rises)
        whole = place.round()
        # a float64 time i / T is the end of step i; a float32 time is taken as it is
        step = torch.where((place - whole).abs() <= 1e-12 * whole, whole - 1, place.floor()).long()
        step = step.clamp(0, len(rises) - 1)
        return (before[step] + (place - step) * rises[step]).to(t.dtype)
