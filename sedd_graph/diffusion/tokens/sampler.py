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
    """Config of a sampler with a fixed number of steps."""

    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128
    """Number of steps, of equal length in t, from 1 to 1,000,000.

    Noise removal at the end takes one more network evaluation.
    """


class Sampler(Component, ABC):
    """A sampler: generates rows of tokens from noise. Its Config is :class:`SamplerConfig` or a subclass of it."""

    abstract: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the network outputs that the sampler accepts."""
    needs_mask: ClassVar[bool] = False
    """True if the sampler requires a kernel with :attr:`Kernel.masks_evenly`."""
    exact: ClassVar[bool] = False
    """True if samples have the model's distribution at any number of steps, and not only in the limit of many steps."""
    exact_alone: ClassVar[bool] = True
    """True if samples of independent tokens have the model's distribution at any number of steps.

    Tokens of one row are then wrong only by what they share. False for a sampler whose steps are approximations for one
    token too, such as Euler's.
    """
    Config: ClassVar[type[ComponentConfig]] = SamplerConfig
    config: SamplerConfig

    clamped: int = 0
    """Number of clamped moves in the last run: changes of one token whose probabilities were outside [0, 1].

    They occur if steps are too large, or if scores are not those of a distribution.
    """
    evaluations: int = 0
    """Number of rows that the network evaluated in the last run, summed over steps."""

    def lacks(self, kernel: Kernel) -> str | None:
        """Return a description of the kind of kernel that the sampler requires; None if ``kernel`` is suitable."""
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def heuristic(self) -> str | None:
        """Return why samples do not converge to the model's distribution with more steps; None if they converge."""
        if self.config.temperature != 1 or self.config.top_p != 1:
            return "temperature and top_p change the distribution of the tokens"
        return None

    @property
    def steps(self) -> int | None:
        """Number of steps; None for a sampler whose number of network evaluations is random."""
        return getattr(self.config, "steps", None)

    @abstractmethod
    def walk(self, walk: Walk, steps: int) -> None:
        """Advance ``walk`` from noise to clean text.

        Args:
            walk: The rows and the operations on them.
            steps: Number of steps; 0 for a sampler without a number of steps.
        """

    @torch.no_grad()
    def run(self, denoise: Denoise, x: Tensor, settings: WalkSettings, *, steps: int | None = None) -> Tensor:
        """Generate clean rows.

        Args:
            denoise: Evaluates the network.
            x: Noise, int64 [b, l], with the given tokens at positions that are not free.
            settings: The process, and the conditions on the rows.
            steps: Number of steps; None: the number in the Config.

        Returns:
            The generated rows, int64 [b, l].

        Raises:
            UserError: ``steps`` is given and the sampler has no number of steps, or no completion of a row satisfies
                ``settings.matching``.
            SeddGraphError: The sampler changed rows without :meth:`Walk.draw`, so that they violate
                ``settings.matching``.
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
    """A sampler that steps along an even grid of times from 1 to ``T_MIN``, then removes the remaining noise."""

    abstract: ClassVar[bool] = True
    Config: ClassVar[type[ComponentConfig]] = StepsConfig
    config: StepsConfig

    @abstractmethod
    def step(self, walk: Walk, t: Tensor, s: Tensor | None) -> None:
        """Advance ``walk`` by one step, from time ``t`` down to time ``s``.

        Args:
            walk: The rows and the operations on them.
            t: Current time, [b].
            s: Time after the step, [b]; None: remove all remaining noise.
        """

    def walk(self, walk: Walk, steps: int) -> None:
        rows = walk.x.shape[0]
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.x.device, dtype=torch.float64).float()
        for index in range(steps + 1):
            below = None if index == steps else times[index + 1].expand(rows)
            self.step(walk, times[index].expand(rows), below)
            walk.end_step()
