"""The interface of samplers, which generate rows of tokens from noise. Implementations are components.

A sampler is a loop over a :class:`~sedd_graph.diffusion.tokens.walk.Walk`. Axes: b batch, l length, n states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.diffusion.tokens.kernel import ONLY_MASKS, Kernel
from sedd_graph.diffusion.tokens.walk import T_MIN, Denoise, SamplerConfig, Walk, WalkSettings
from sedd_graph.errors import SeddGraphError, UserError

__all__ = ["Sampler", "StepSampler", "StepsConfig"]


class StepsConfig(SamplerConfig):
    """Config of a sampler with a number of steps."""

    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128
    """Steps, of equal length in t, from 1 to 1,000,000. Noise removal at the end is one more network evaluation."""


class Sampler(Component, ABC):
    """Generates rows from noise. Its Config is or extends :class:`SamplerConfig`."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the network outputs that the sampler accepts."""
    needs_mask: ClassVar[bool] = False
    """True if the sampler requires :attr:`Kernel.masks_evenly`."""
    exact: ClassVar[bool] = False
    """True if samples have the model's distribution at any number of steps; otherwise in the limit of many steps."""
    Config: ClassVar[type[ComponentConfig]] = SamplerConfig
    config: SamplerConfig

    clamped: int = 0
    """Moves of the last run whose probabilities were out of range: steps were too large, or the scores belong to no distribution."""
    evaluations: int = 0
    """Rows that the network evaluated in the last run."""

    def lacks(self, kernel: Kernel) -> str | None:
        """Return the kind of kernel that the sampler needs, in words; None if ``kernel`` is suitable."""
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def heuristic(self) -> str | None:
        """Return why samples do not have the model's distribution under this Config even in many steps; None if they do."""
        if self.config.temperature != 1 or self.config.top_p != 1:
            return "temperature and top_p change the distribution of the tokens"
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps; None for a sampler whose number of evaluations is random."""
        return getattr(self.config, "steps", None)

    @abstractmethod
    def walk(self, walk: Walk, steps: int) -> None:
        """Take ``walk`` from noise to text without masks. ``steps`` is 0 for a sampler without a number of steps."""

    @torch.no_grad()
    def run(self, denoise: Denoise, x: Tensor, settings: WalkSettings, *, steps: int | None = None) -> Tensor:
        """Generate clean rows.

        Args:
            denoise: Evaluates the network.
            x: Rows of noise, int64 [b, l], with given tokens at positions that are not free.
            settings: The process and the conditions on the rows.
            steps: Number of steps; by default that of the Config.

        Returns:
            int64 [b, l].

        Raises:
            UserError: ``steps`` is given, and the sampler has no number of steps.
            SeddGraphError: The sampler changed rows without :meth:`Walk.draw`, so that they violate ``settings.matching``.
        """
        if steps is not None and self.steps is None:
            raise UserError("this sampler takes no number of steps: its number of network evaluations is random")
        walk = Walk(denoise, x, settings, self.config)
        self.walk(walk, steps or self.steps or 0)
        self.clamped, self.evaluations = walk.clamped, walk.evaluations
        if settings.matching is not None and not settings.matching.matches(walk.x):
            raise SeddGraphError(
                f"{type(self).__name__} changed tokens by other means than Walk.draw: rows do not match"
            )
        return walk.x


class StepSampler(Sampler):
    """A sampler of independent steps on an even grid of times. The last one removes the remaining noise."""

    abstract: ClassVar[bool] = True
    Config: ClassVar[type[ComponentConfig]] = StepsConfig
    config: StepsConfig

    @abstractmethod
    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        """Take ``walk`` from time ``t`` [b] down to ``s`` [b], or to clean text if ``s`` is None."""

    def walk(self, walk: Walk, steps: int) -> None:
        rows = walk.x.shape[0]
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64).float()
        for index in range(steps + 1):
            below = None if index == steps else times[index + 1].expand(rows)
            self.step(walk, times[index].expand(rows), below)
            walk.end_step()
