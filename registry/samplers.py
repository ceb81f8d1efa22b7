"""Samplers: Euler, analytic (Tweedie) and ancestral steps, each ending in noise removal."""

from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.component import ComponentConfig
from sedd_graph.diffusion.process import Kernel, Sampler, Schedule

Steps = Annotated[int, pydantic.Field(ge=1, le=1_000_000)]


class StepsConfig(ComponentConfig):
    """How many steps of even length in t; noise removal is one evaluation more."""

    steps: Steps = 128


def _score(outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor, kernel: Kernel) -> Tensor:
    if "log_score" in outputs:
        return outputs["log_score"].float().exp()
    return kernel.log_score(outputs["log_x0"].float(), x, sigma).exp()


class Euler(Sampler, kind="sampler"):
    """One Euler step of the reverse process per stretch of time (SEDD, section 4.1, tau-leaping)."""

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        pass

    def step(
        self, outputs: Mapping[str, Tensor], x: Tensor, t: Tensor, s: Tensor | None, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        sigma = schedule.sigma(t)
        score = _score(outputs, x, sigma, kernel)
        if s is None:
            return kernel.analytic(score, x, sigma, torch.zeros_like(sigma))
        rate = kernel.reverse_rate(score, x, sigma) * ((t - s) * schedule.dsigma(t))[:, None, None]
        return rate.scatter(-1, x[..., None], (1 - rate.sum(-1, keepdim=True)).clamp(min=0))


class Analytic(Sampler, kind="sampler"):
    """Tweedie tau-leaping: the best step among those that treat positions apart (SEDD, theorem 4.2)."""

    reads = ("log_score", "log_x0")

    class Config(StepsConfig):
        pass

    def step(
        self, outputs: Mapping[str, Tensor], x: Tensor, t: Tensor, s: Tensor | None, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        sigma = schedule.sigma(t)
        below = torch.zeros_like(sigma) if s is None else schedule.sigma(s)
        return kernel.analytic(_score(outputs, x, sigma, kernel), x, sigma, below)


class Ancestral(Sampler, kind="sampler"):
    """The posterior of the next state under the predicted clean token (D3PM; MDLM, eq. 7)."""

    reads = ("log_x0",)

    class Config(StepsConfig):
        pass

    def step(
        self, outputs: Mapping[str, Tensor], x: Tensor, t: Tensor, s: Tensor | None, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        sigma = schedule.sigma(t)
        below = torch.zeros_like(sigma) if s is None else schedule.sigma(s)
        return kernel.posterior(outputs["log_x0"].float().exp(), x, sigma, below)
