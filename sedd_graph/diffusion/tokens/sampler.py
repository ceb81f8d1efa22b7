"""The interface of samplers, which generate rows of tokens from noise. Implementations are components.

A sampler is a loop over a :class:`~sedd_graph.diffusion.tokens.walk.Walk`. Axes: b batch, l length, n states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.tokens.kernel import CONTINUOUS, ONLY_MASKS, Kernel
from sedd_graph.diffusion.tokens.walk import T_MIN, Denoise, SamplerConfig, Walk, WalkSettings
from sedd_graph.errors import SeddGraphError, UserError

__all__ = ["PositionsConfig", "Sampler", "StepSampler", "StepsConfig", "Stepwise", "chosen_steps"]


def chosen_steps(given: int | None, declared: int | None) -> int:
    """Return the number of steps of a sampling run.

    Args:
        given: The number that the caller asks for; None: the declared number.
        declared: The number in the Config of the sampler; None if the sampler has no number of steps.

    Returns:
        The number of steps; 0 for a sampler without one.

    Raises:
        UserError: ``given`` is below 1, or the sampler has no number of steps.
    """
    if given is None:
        return declared or 0
    if declared is None:
        raise UserError("this sampler takes no number of steps: its number of network evaluations is random")
    if given < 1:
        raise UserError(f"sample: steps must be at least 1, not {given}")
    return given


class StepsConfig(SamplerConfig):
    """Config of a sampler with a fixed number of steps."""

    steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128
    """Number of steps, of equal length in t, from 1 to 1,000,000.

    Noise removal at the end takes one more network evaluation.
    """


class PositionsConfig(StepsConfig):
    """Config of a sampler whose steps change each position with some probability."""

    positions: Literal["independent", "systematic"] = "independent"
    """How the positions that change in a step are drawn.

    ``independent``: each by itself. ``systematic``: as far from each other in the row as possible, each with the same
    probability as before. With few steps, tokens that are drawn together then depend on each other less. For kernels in
    continuous time.
    """

    @property
    def spread(self) -> bool:
        return self.positions == "systematic"


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
    """True if samples have the model's distribution at any number of steps, provided that the tokens of a row are
    independent under the model.

    The samples of any model are then wrong only in the dependence between tokens. False for a sampler whose steps are
    approximations for a single token too, such as Euler's.
    """
    discrete: ClassVar[bool] = False
    """True if the sampler accepts kernels in discrete time (:attr:`Kernel.steps`), of which it visits a subset of the
    steps."""
    takes_all: ClassVar[bool] = False
    """True if every token that :meth:`Walk.draw` returns is put into the rows, as importance weights require."""
    Config: ClassVar[type[ComponentConfig]] = SamplerConfig
    config: SamplerConfig

    log_weight: Tensor | None = None
    """Log importance weight of each row of the last run, float64 [b]; None without ``WalkSettings.unconditioned``."""
    clamped: int = 0
    """Number of clamped moves in the last run: changes of one token whose probabilities were outside [0, 1].

    They occur if steps are too large, or if scores are not those of a distribution.
    """
    evaluations: int = 0
    """Number of rows that the network evaluated in the last run, summed over steps."""

    def lacks(self, kernel: Kernel) -> str | None:
        """Return a description of the kind of kernel that the sampler requires; None if ``kernel`` is suitable."""
        if kernel.steps is not None:
            if not self.discrete:
                return CONTINUOUS
            if (self.steps or 0) > kernel.steps:
                return f"a kernel of at least as many steps as it takes ({self.steps:,})"
            if self.config.spread:
                return f"{CONTINUOUS}, since its positions are systematic"
        return ONLY_MASKS if self.needs_mask and not kernel.masks_evenly else None

    def heuristic(self) -> str | None:
        """Return why samples do not converge to the model's distribution with more steps; None if they converge."""
        if self.config.temperature != 1 or self.config.top_p != 1:
            return "temperature and top_p change the distribution of the tokens"
        return None

    def alone(self, kernel: Kernel) -> bool:
        """Return whether samples of independent tokens have the model's distribution at any number of steps.

        With positions that do not change independently they do if the kernel masks all tokens at one rate: only then is a
        token independent of the step in which it is drawn.
        """
        if self.exact or self.steps is None:
            return True
        return self.exact_alone and (kernel.masks_evenly or not self.config.spread)

    @property
    def order(self) -> float:
        """Order p of convergence: with many steps the error of the samples falls as steps to the power -p.

        1 where tokens that change in one step are drawn independently, and the number of such tokens falls as 1 /
        steps. Samplers that also mask tokens again are slower.
        """
        return 1.0

    def claim(self) -> str:
        """Return a sentence on the distribution of the samples: exact, exact in the limit of many steps, or neither.

        It is printed in the certificate, the record of claims and checks that a build writes.
        """
        if (reason := self.heuristic()) is not None:
            return f"samples do not follow the model, however many the steps: {reason}"
        if self.exact:
            return "with a perfect network samples follow the distribution of the data, at any number of steps"
        if self.steps is None:
            return "with a perfect network samples follow the distribution of the data"
        return (
            "with a perfect network samples follow the distribution of the data in the limit of many steps "
            f"(error of order steps^-{self.order:g})"
        )

    @property
    def steps(self) -> int | None:
        """Number of steps; None for a sampler whose number of network evaluations is random."""
        return getattr(self.config, "steps", None)

    def times(self, kernel: Kernel, steps: int) -> list[float] | None:
        """Return the times at which the steps start, in order; None for a sampler without a grid of times.

        Args:
            kernel: The forward process.
            steps: Number of steps of the sampler.
        """
        return None

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
            steps: Number of steps, at least 1; None: the number in the Config.

        Returns:
            The generated rows, int64 [b, l].

        Raises:
            UserError: ``steps`` is below 1, or is given and the sampler has no number of steps; no completion of a row
                satisfies ``settings.matching``; or outputs of the network are not finite or not normalised.
            SeddGraphError: The sampler changed rows without :meth:`Walk.draw`, so that they violate
                ``settings.matching``.
        """
        taken = chosen_steps(steps, self.steps)
        walk = Walk(denoise, x, settings, self.config)
        with full_precision(x):  # the network has the autocast that was on when its function was made
            self.walk(walk, taken)
        walk.check_outputs()
        walk.x = walk.draws.settle(walk.x)
        self.clamped, self.evaluations = walk.clamped, walk.evaluations
        self.log_weight = None if walk.weights is None else walk.weights.log
        if settings.matching is not None and not settings.matching.matches(walk.x):
            raise SeddGraphError(
                f"{type(self).__name__} changed tokens by other means than Walk.draw: rows do not match"
            )
        return walk.x


class Stepwise(ABC):
    """Mixin of a sampler whose run may be divided: each part takes one evaluation of the network.

    A program that evaluates the network itself can then run the sampler
    (:class:`sedd_graph.engine.block_steps.BlockSteps`). Between two parts, all that the sampler keeps are its rows and
    tensors with one entry for each row, so that rows may be batched anew for each part.
    """

    @abstractmethod
    def begin(self, walk: Walk, steps: int) -> tuple[Tensor, ...]:
        """Return what the sampler keeps of each row before the first part, tensors [b, ...].

        Args:
            walk: The rows and the operations on them.
            steps: Number of steps; 0 for a sampler without a number of steps.
        """

    @abstractmethod
    def advance(self, walk: Walk, kept: tuple[Tensor, ...], number: int, steps: int) -> tuple[Tensor, ...]:
        """Advance ``walk`` by one evaluation of the network.

        Args:
            walk: The rows and the operations on them.
            kept: What the sampler keeps of each row, tensors [b, ...].
            number: Number of the part, from 0.
            steps: Number of steps; 0 for a sampler without a number of steps.

        Returns:
            What the sampler keeps of each row for the next part.
        """


class StepSampler(Sampler):
    """A sampler that steps along an even grid of times from 1 to ``T_MIN``, then removes the remaining noise.

    Under a kernel in discrete time the times are those of some of its steps, and the last step leads to clean text.
    """

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

    def times(self, kernel: Kernel, steps: int) -> list[float]:
        if (total := kernel.steps) is None:
            found: list[float] = torch.linspace(1.0, T_MIN, steps + 1, dtype=torch.float64).tolist()
            return found
        if steps > total:
            raise UserError(f"sample: {steps:,} steps are more than the {total:,} of the kernel")
        visited = torch.linspace(total, 0, steps + 1, dtype=torch.float64).round()
        return [step / total for step in visited[:-1].tolist()]

    def walk(self, walk: Walk, steps: int) -> None:
        rows, grid = walk.x.shape[0], self.times(walk.kernel, steps)
        times = torch.tensor(grid, device=walk.x.device, dtype=torch.float64).float()
        walk.set_grid(times)
        with walk.kernel.visiting(grid):
            for index in range(len(grid)):
                below = None if index == len(grid) - 1 else times[index + 1].expand(rows)
                self.step(walk, times[index].expand(rows), below)
                walk.end_step()
