"""FlexMDM (arXiv 2509.01025): masked diffusion whose model chooses lengths. Kernel, head, bound and samplers.

Axes: b batch, l positions of a row (the start state, tokens and masks), d model width; w positions and v data tokens of
strings.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import pydantic
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.flexmdm import MASKS_AND_DELETES, FlexDraw, FlexKernel
from sedd_graph.diffusion.strings.kernel import StringKernel, StringObjective, StringTable
from sedd_graph.diffusion.strings.sampler import StringSampler, StringWalk
from sedd_graph.diffusion.tokens.walk import T_MIN

from ..bijective._bijection import wide
from ..objectives.bounds import TimeConfig
from ._heads import Scalar
from .samplers import Thinning, ThinningConfig

__all__ = ["FlexLoss", "FlexTau", "FlexThinning", "GapHead", "MaskDelete"]


class MaskDelete(FlexKernel, kind="string_kernel"):
    """Tokens become masks and masks are deleted; noise is the empty string (FlexMDM, arXiv 2509.01025). Generation puts masks in
    and fills them, in any order.

    With ``loglinear`` and ``pace: 1`` both schedules of the paper are linear.
    """

    class Config(ComponentConfig):
        pace: Annotated[float, pydantic.Field(ge=1, le=1000)] = 1.0
        """The rate at which a mask is filled, beside that at which a missing token is put in; 1 - b = (1 - a)^pace of the paper's
        two schedules. The larger, the fewer masks stand at a time."""

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.flexmdm import FlexTable

        return FlexTable(self)

    @property
    def pace(self) -> float:
        pace: float = self.config.pace
        return pace


class GapHead(Component, kind="head"):
    """The log of how many tokens are missing behind each position, in float32 (FlexMDM)."""

    class Config(ComponentConfig):
        most: SizeField = 1024
        """No gap is ever said to miss more tokens than this."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = Scalar(self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        with full_precision(x):
            highest = math.log(self.config.most)
            return highest - F.softplus(highest - self.linear(wide(x)))


class FlexLoss(StringObjective[FlexKernel, FlexDraw], kind="string_objective"):
    """FlexMDM's loss (arXiv 2509.01025): cross-entropy at masks, and how many tokens are missing in each gap.

    Of the expected number g and the head's ghat: sum over gaps of ghat - g + g log(g / ghat), at the rate of insertion, and
    pace times the divergence of what stands under each mask from what is predicted. A string's length is part of what is
    bounded.
    """

    class Config(TimeConfig):
        targets: Literal["exact", "sampled"] = "exact"
        """``exact``: the means over all ways in which the string can have come from the clean one, by dynamic programming.
        ``sampled``: what was deleted and masked itself, as in the paper, of the same mean and more variance, for no work; in
        training only."""

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, FlexKernel) else MASKS_AND_DELETES

    def corrupt(
        self, batch: Batch, kernel: FlexKernel, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> FlexDraw:
        t, width = self.config.draw(batch, random, t)
        sampled = self.config.targets == "sampled"
        return _draw(batch, kernel, schedule.sigma(t), width * schedule.dsigma(t), random, sampled=sampled)

    def bound_draw(self, batch: Batch, kernel: FlexKernel, schedule: Schedule, *, random: Randomness) -> FlexDraw:
        u = random.low_discrepancy(len(batch)).double().to(batch.tokens.device).clamp(min=1e-9)
        sigma, slope = kernel.clock(u)
        draw = _draw(batch, kernel, sigma, slope, random, sampled=False)
        # beyond the end of the schedule the network is told of the end: it has never seen more
        end = float(schedule.sigma(torch.ones(1, dtype=torch.float64, device=u.device)))
        return dataclasses.replace(draw, sigma=draw.sigma.clamp(max=end))

    def loss(self, outputs: Mapping[str, Tensor], draw: FlexDraw, kernel: FlexKernel) -> Tensor:
        log_gap = outputs["log_gap"].float().masked_fill(~draw.attend, 0.0)
        gaps = torch.where(draw.attend, log_gap.exp() - draw.missing * log_gap, 0.0).sum(-1)
        said = outputs["log_x0"].float().gather(-1, draw.symbols.transpose(1, 2)).transpose(1, 2)
        masks = -(draw.filled * said).sum((1, 2))
        return draw.weights[:, 0] * gaps + draw.weights[:, 1] * masks + draw.constant


def _draw(
    batch: Batch, kernel: FlexKernel, sigma: Tensor, slope: Tensor, random: Randomness, *, sampled: bool
) -> FlexDraw:
    strings = kernel.sample(batch, sigma, random=random, width=1 + batch.width)
    target = kernel.sampled_target(batch, strings) if sampled else kernel.target(batch, strings)
    weights = (kernel.weights(sigma) * slope[:, None].double()).float()
    return FlexDraw(
        strings.tokens,
        strings.attend,
        sigma.float(),
        target.missing,
        target.filled,
        target.symbols,
        weights,
        (weights * target.constant).sum(-1),
        cut=strings.cut,
    )


def _gaps(walk: StringWalk[FlexKernel], outputs: Mapping[str, Tensor]) -> Tensor:
    """How many tokens are missing in each gap, float64 [b, w]: 0 where nothing may be put in."""
    return outputs["log_gap"].double().exp() * (walk.strings.attend & ~walk.shut)


def _fill(walk: StringWalk[FlexKernel], outputs: Mapping[str, Tensor], where: Tensor) -> None:
    """Draw the tokens under the masks ``where``, bool [b, w]."""
    log_x0 = outputs["log_x0"].float()[where][:, : walk.kernel.data_tokens]
    if walk.allowed is not None:
        log_x0 = log_x0.masked_fill(~walk.allowed, -math.inf)
    walk.write(where, log_x0.softmax(-1))


def _put(walk: StringWalk[FlexKernel], follow: Tensor) -> None:
    """Put ``follow`` int64 [b, w] masks into each gap, as far as there is room."""
    none = torch.zeros_like(walk.fixed)
    walk.rewrite(walk.fitting(follow, none), lambda place: torch.full_like(place, walk.kernel.mask), none)


def _finish(walk: StringWalk[FlexKernel], sigma: Tensor) -> None:
    """Fill every mask that is left; nothing is put in any more."""
    masks = walk.kernel.masks(walk.strings)
    if bool(masks.any()):
        _fill(walk, walk.outputs(sigma), masks)
    walk.shown()


class FlexTau(StringSampler[FlexKernel], kind="string_sampler"):
    """Steps of even length in time: in each, every gap takes a Poisson number of masks, and every mask is filled with the chance
    that it is by then (tau-leaping, FlexMDM, arXiv 2509.01025). A last step fills all masks that are left."""

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if isinstance(kernel, FlexKernel) else MASKS_AND_DELETES

    def walk(self, walk: StringWalk[FlexKernel], steps: int) -> None:
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.fixed.device, dtype=torch.float64)
        levels = walk.schedule.sigma(times)[:, None].expand(-1, walk.rows)
        for now, after in itertools.pairwise(levels):
            outputs, chances = walk.outputs(now), walk.kernel.leap(now, after)
            many = torch.poisson(_gaps(walk, outputs) * chances[:, :1], generator=walk.generator).long()
            masks = walk.kernel.masks(walk.strings)
            _fill(walk, outputs, masks & (walk.rand(*masks.shape) < chances[:, 1:]))
            _put(walk, many)
            walk.shown()
        _finish(walk, levels[-1])


class FlexThinning(Thinning[FlexKernel], kind="string_sampler"):
    """One mask put in or filled at a time, at the times of the reverse process itself: exact for the model's rates (as
    ``string_thinning``). ``clamped`` counts where a proposed rate was too low; where there are none, the law is that of the model.
    """

    class Config(ThinningConfig):
        pass

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if isinstance(kernel, FlexKernel) else MASKS_AND_DELETES

    def edits(
        self, walk: StringWalk[FlexKernel], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        def act(hit: Tensor) -> None:
            _fill(walk, outputs, hit[:, 1])
            _put(walk, hit[:, 0].long())

        return torch.stack([_gaps(walk, outputs), walk.kernel.masks(walk.strings).double()], 1), act

    def end(self, walk: StringWalk[FlexKernel], sigma: Tensor) -> None:
        _finish(walk, sigma)
