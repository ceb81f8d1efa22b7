"""The interface of samplers, which draw rows of tokens from noise. Implementations are components.

A sampler is its own loop over a :class:`~sedd_graph.diffusion.tokens.walk.Walk`. Axes: b batch, l length, n states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import Component
from sedd_graph.diffusion.tokens.kernel import ONLY_MASKS, Kernel
from sedd_graph.diffusion.tokens.walk import T_MIN, Denoise, SamplerConfig, Walk, WalkSettings
from sedd_graph.errors import SeddGraphError, UserError

__all__ = ["Sampler", "StepSampler", "StepsConfig"]


class StepsConfig(SamplerConfig):
    """How many steps of even length in t; noise removal is one evaluation more."""

    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128


class Sampler(Component, ABC):
    """Noise to text. Its Config extends :class:`SamplerConfig`."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of model outputs that it can take."""
    needs_mask: ClassVar[bool] = False
    """Whether it works only with a kernel that masks all tokens at one rate, and does nothing else."""
    exact: ClassVar[bool] = False
    """Whether it adds no error of its own; otherwise its law is the model's as the steps grow in number."""

    clamped = 0
    """Moves of the last run whose chances were out of range: its steps were too large, or its scores no scores."""
    evaluations = 0
    """How many rows went through the network in the last run."""

    def lacks(self, kernel: Kernel) -> str | None:
        """What kind of kernel it needs, where ``kernel`` is not one of them."""
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def heuristic(self) -> str | None:
        """Why, as configured, its law is not the model's however many steps it takes; None where it is."""
        if self.config.temperature != 1 or self.config.top_p != 1:
            return "temperature and top_p change the law of the tokens"
        return None

    @property
    def steps(self) -> int | None:
        """How many steps it takes, or None where the rows decide."""
        return getattr(self.config, "steps", None)

    @abstractmethod
    def walk(self, walk: Walk, steps: int) -> None:
        """Take ``walk`` from noise to text; ``steps`` is 0 for a sampler that has none. Ends with no mask left."""

    @torch.no_grad()
    def run(self, denoise: Denoise, x: Tensor, settings: WalkSettings, *, steps: int | None = None) -> Tensor:
        """Sample clean rows, int64 [b, l], from noise ``x`` int64 [b, l].

        Raises :class:`UserError` where ``steps`` is given to a sampler that has none.
        """
        if steps is not None and self.steps is None:
            raise UserError("this sampler takes no number of steps: its rows decide how often the network is asked")
        walk = Walk(denoise, x, settings, self.config)
        self.walk(walk, steps or self.steps or 0)
        self.clamped, self.evaluations = walk.clamped, walk.evaluations
        if settings.matching is not None and not settings.matching.matches(walk.x):
            raise SeddGraphError(f"{type(self).__name__} moved tokens by other means than its walk: rows do not match")
        return walk.x


class StepSampler(Sampler):
    """A sampler whose steps go down an even grid of times, each by itself; the last removes what noise is left."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        """Take ``walk`` from time ``t`` [b] down to ``s`` [b], or to clean text where ``s`` is None."""

    def walk(self, walk: Walk, steps: int) -> None:
        rows = walk.x.shape[0]
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64).float()
        for index in range(steps + 1):
            below = None if index == steps else times[index + 1].expand(rows)
            self.step(walk, times[index].expand(rows), below)
            walk.shown()
