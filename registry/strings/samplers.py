"""Samplers of strings: tau-leaping in time steps, and thinning and first hitting without discretisation error.

An edit is an insertion, deletion or substitution of one token; a gap is the place after a position. Axes: b rows, w
positions (the BOS token first), v data tokens, k kinds of edits (insertion, deletion and, if the kernel has it,
substitution).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.categorical import categorical
from sedd_graph.diffusion.strings.kernel import Kernel_, StringKernel, StringObjective
from sedd_graph.diffusion.strings.sampler import StringSampler, StringWalk
from sedd_graph.diffusion.tokens.walk import T_MIN

__all__ = ["StringFirstHitting", "StringTau", "StringThinning", "Thinning", "ThinningConfig"]

INSERTS = "a kernel whose generation inserts tokens (the output log_insert)"
"""Requirement of a sampler that needs the network output ``log_insert``, a phrase for error messages."""
END = 1e-5
"""Total noise at which thinning ends; one last step from there ends at clean text."""


class StringTau(StringSampler[StringKernel], kind="string_sampler"):
    """Tau-leaping sampler of strings, with steps of equal length in time and a last step to clean text.

    In each step at most one token is inserted in each gap (after each position), and each token may be deleted or
    substituted. Under the kernel ``delete`` this is Tweedie's step (DID, arXiv 2603.23507). Under ``edit_flow`` each
    column of the alignment that still has its noise entry switches to its clean entry, with one probability for all
    columns (arXiv 2506.09018).
    """

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128
        """Number of time steps before the last step, from 1 to 1,000,000."""

    config: Config

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if "log_insert" in kernel.reads else INSERTS

    def walk(self, walk: StringWalk[StringKernel], steps: int) -> None:
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.fixed.device, dtype=torch.float64)
        levels = torch.cat([walk.schedule.sigma(times), times.new_zeros(1)])
        for index in range(steps + 1):
            now, after = (levels[i].expand(walk.rows) for i in (index, index + 1))
            walk.leap(walk.outputs(now), walk.kernel.leap(now, after).float())
            walk.end_step()


class ThinningConfig(ComponentConfig):
    """Config keys of thinning: the rate of proposals, and the noise interval for which the rate is computed."""

    slack: Annotated[float, pydantic.Field(gt=1, le=100)] = 2.0
    """Rate of proposed edits as a multiple of the rate that the model would have at the end of the noise interval
    (``stretch``) with its current outputs, above 1 and at most 100. Larger values make it rarer that the model's rate
    exceeds the rate of proposals, and need more network evaluations."""
    stretch: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    """Relative decrease in total noise after which the network is evaluated again if no edit is proposed, between 0 and
    1."""


class Thinning(StringSampler[Kernel_]):
    """Base class of thinning samplers, which apply one edit at a time, at the event times of the reverse process.

    Thinning proposes events at a rate above the model's and accepts a share of them, so that time is not discretised.
    Subclasses define :meth:`edits` and :meth:`end`.
    """

    abstract: ClassVar[bool] = True
    Config: ClassVar[type[ComponentConfig]] = ThinningConfig
    config: ThinningConfig

    @abstractmethod
    def edits(
        self, walk: StringWalk[Kernel_], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """Return the network's factor of the reverse rate of each possible edit, and a function that applies edits.

        The caller multiplies it by the kernel's factor (``walk.kernel.weights``), which depends on the kind of edit and
        on the noise level.

        Args:
            walk: State of the sampling run, with the current strings.
            outputs: The network's outputs for these strings, by name.

        Returns:
            The factors, float64 [b, k, w], of each of the k kinds of edits (insertions first) at each position, summed
            over the new tokens that are possible. The function takes bool [b, k, w], True at the edits to apply, draws
            the new tokens, and changes the strings of ``walk`` in place.
        """

    @abstractmethod
    def end(self, walk: StringWalk[Kernel_], sigma: Tensor) -> None:
        """Take the last step, from total noise ``sigma`` [b] to clean strings, and update ``walk`` in place."""

    def walk(self, walk: StringWalk[Kernel_], steps: int) -> None:
        rows, kernel = walk.rows, walk.kernel
        sigma, bound = walk.schedule.sigma(walk.full(1.0)), walk.full(1.0)
        proposed = torch.zeros_like(bound, dtype=torch.bool)
        while walk.read((sigma > END).any()):
            each, make = self.edits(walk, walk.outputs(sigma))
            each[:, 0] *= (walk.strings.lengths < walk.longest)[:, None]
            kinds = each.shape[1]
            per_edit = (each * kernel.weights(sigma)[:, :kinds, None]).flatten(1)
            total = per_edit.sum(-1)
            walk.clamped += int((proposed & (total > bound * (1 + 1e-9))).sum())
            happens = proposed & (walk.rand(rows) * bound < total)
            # rows without an edit draw the next event time
            lower = (sigma * (1 - self.config.stretch)).clamp(min=END)
            highest = self.config.slack * (each.sum(-1) * kernel.weights(lower)[:, :kinds]).sum(-1)
            wait = -torch.log1p(-walk.rand(rows)) / highest.clamp(min=1e-300)
            # an event beyond the end of the interval does not happen
            reached = (sigma - wait > lower) & (sigma > END)
            still = ~happens
            sigma = torch.where(still, torch.where(reached, sigma - wait, lower), sigma)
            bound = torch.where(still & reached, highest, bound)
            proposed = still & reached
            if bool(happens.any()):
                chosen = torch.zeros_like(happens, dtype=torch.int64)
                chosen[happens] = categorical(per_edit[happens], generator=walk.generator)
                hit = torch.zeros_like(per_edit, dtype=torch.bool).scatter_(1, chosen[:, None], happens[:, None])
                make(hit.view(each.shape))
            walk.end_step()
        self.end(walk, sigma)


class StringThinning(Thinning[StringKernel], kind="string_sampler"):
    """Thinning sampler of strings: applies one edit at a time, at event times of the reverse process.

    It has no time discretisation error (thinning: Lewis and Shedler 1979). Edits are proposed at a rate (``slack``)
    above the model's; a proposal is accepted with probability equal to the model's rate at the proposed time over the
    rate of proposals. ``clamped`` counts the proposals for which this ratio is above 1; if it is 0, samples have
    the model's distribution.
    """

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if "log_insert" in kernel.reads else INSERTS

    def edits(
        self, walk: StringWalk[StringKernel], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        weights, others = walk.insertions(outputs), walk.substitutions(outputs)
        kinds = [weights.sum(-1), walk.deletions(outputs)]
        if others is not None:
            kinds.append(others.sum(-1))

        def make(hit: Tensor) -> None:
            walk.edit(hit[:, 0], weights, hit[:, 1], None if others is None else hit[:, 2], others)

        return torch.stack(kinds, 1).double(), make

    def end(self, walk: StringWalk[StringKernel], sigma: Tensor) -> None:
        walk.leap(walk.outputs(sigma), walk.kernel.leap(sigma, torch.zeros_like(sigma)).float())


class StringFirstHitting(StringSampler[StringKernel], kind="string_sampler"):
    """First-hitting sampler of strings: inserts one token at a time until the string has its known length.

    The position and the token of each insertion are drawn in proportion to the model's rates. The sampler has no
    discretisation error for objectives of strings of one known length, such as ``dice``, under which the model's rates
    do not depend on time (DID, arXiv 2603.23507; arXiv 2409.02908 for masks).
    """

    class Config(ComponentConfig):
        pass

    config: Config

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if objective.one_length else "an objective for strings of one known length, such as dice"

    def walk(self, walk: StringWalk[StringKernel], steps: int) -> None:
        share = -torch.expm1(-walk.schedule.sigma(walk.full(1.0)))
        for _ in range(walk.longest):
            left = walk.longest - walk.strings.lengths
            # the event time of the next of `left` tokens, for a network that depends on it
            share = share * walk.rand(walk.rows) ** (1 / left.clamp(min=1))
            if not walk.insert_one(-torch.log1p(-share)):
                break
