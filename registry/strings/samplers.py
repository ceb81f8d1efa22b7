"""Samplers of strings that grow and shrink: steps in time, thinning (exact), and first hitting (exact at a known length).

Axes: b rows, w positions (the start state first), v data tokens.
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
"""What some parts need, as the rest of a sentence."""
END = 1e-5
"""Total noise at which thinning gives way to one last step to clean text."""


class StringTau(StringSampler[StringKernel], kind="string_sampler"):
    """Steps of even length in time: in each, every gap takes at most one token and every token may go or be replaced
    (tau-leaping; for ``delete`` Tweedie's step, DID, arXiv 2603.23507; for ``edit_flow`` a column's chance to move, arXiv
    2506.09018). A last step goes all the way to clean text."""

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if "log_insert" in kernel.reads else INSERTS

    def walk(self, walk: StringWalk[StringKernel], steps: int) -> None:
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.fixed.device, dtype=torch.float64)
        levels = torch.cat([walk.schedule.sigma(times), times.new_zeros(1)])
        for index in range(steps + 1):
            now, after = (levels[i].expand(walk.rows) for i in (index, index + 1))
            walk.leap(walk.outputs(now), walk.kernel.leap(now, after).float())
            walk.shown()


class ThinningConfig(ComponentConfig):
    """How far ahead edits are proposed."""

    slack: Annotated[float, pydantic.Field(gt=1, le=100)] = 2.0
    stretch: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.2
    """Share of the noise after which the network is asked anew, though nothing has happened."""


class Thinning(StringSampler[Kernel_]):
    """The loop of samplers that make one edit at a time, at times of the reverse process itself."""

    abstract: ClassVar[bool] = True

    @abstractmethod
    def edits(
        self, walk: StringWalk[Kernel_], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """What each edit weighs, float64 [b, k, w] by kind as in the kernel's ``weights``, insertions first; and what makes
        some of them, bool [b, k, w]."""

    @abstractmethod
    def end(self, walk: StringWalk[Kernel_], sigma: Tensor) -> None:
        """The last step, from total noise ``sigma`` [b] to clean strings."""

    def walk(self, walk: StringWalk[Kernel_], steps: int) -> None:
        rows, kernel = walk.rows, walk.kernel
        sigma, bound = walk.schedule.sigma(walk.full(1.0)), walk.full(1.0)
        proposed = torch.zeros_like(bound, dtype=torch.bool)
        while bool((sigma > END).any()):
            each, make = self.edits(walk, walk.outputs(sigma))
            each[:, 0] *= (walk.strings.lengths < walk.longest)[:, None]
            kinds = each.shape[1]
            per_edit = (each * kernel.weights(sigma)[:, :kinds, None]).flatten(1)
            total = per_edit.sum(-1)
            walk.clamped += int((proposed & (total > bound * (1 + 1e-9))).sum())
            happens = proposed & (walk.rand(rows) * bound < total)
            # who has not just been changed draws the next time
            lower = (sigma * (1 - self.config.stretch)).clamp(min=END)
            highest = self.config.slack * (each.sum(-1) * kernel.weights(lower)[:, :kinds]).sum(-1)
            wait = -torch.log1p(-walk.rand(rows)) / highest.clamp(min=1e-300)
            # as the stretch ends before the edit, nothing happens in it
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
            walk.shown()
        self.end(walk, sigma)


class StringThinning(Thinning[StringKernel], kind="string_sampler"):
    """One edit at a time, at the times of the reverse process itself: exact for the model's rates (thinning: Lewis and Shedler
    1979; uniformization, arXiv 2402.08095).

    Edits are proposed at ``slack`` times the present rate, and kept with the chance that the rate at the proposed time is of
    that. ``clamped`` counts where it was more; where there are none, the law is that of the model.
    """

    class Config(ThinningConfig):
        pass

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
    """One token at a time, where and what both drawn from the rates, until the length is reached: exact where all strings have
    one length (``dice``), since rates then do not depend on time (DID; arXiv 2409.02908 for masks)."""

    class Config(ComponentConfig):
        pass

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if objective.one_length else "an objective for strings of one known length, such as dice"

    def walk(self, walk: StringWalk[StringKernel], steps: int) -> None:
        share = -torch.expm1(-walk.schedule.sigma(walk.full(1.0)))
        for _ in range(walk.longest):
            left = walk.longest - walk.strings.lengths
            if not bool((left > 0).any()):
                break
            # the time of the next of `left` tokens, for a network that looks at it
            share = share * walk.rand(walk.rows) ** (1 / left.clamp(min=1))
            weights = walk.insertions(walk.outputs(-torch.log1p(-share)))
            each = weights.sum(-1)
            going = (left > 0) & (each.sum(-1) > 0)
            if not bool(going.any()):
                break
            chosen = torch.zeros_like(left)
            chosen[going] = categorical(each[going], generator=walk.generator)
            put = torch.zeros_like(walk.fixed).scatter_(1, chosen[:, None], going[:, None])
            walk.edit(put, weights, torch.zeros_like(put))
            walk.shown()
