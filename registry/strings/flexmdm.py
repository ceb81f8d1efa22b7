"""FlexMDM (arXiv 2509.01025): masked diffusion whose model chooses lengths. Kernel, head, objective and samplers.

Axes: b batch, l positions of a string (the start state, tokens and masks; w outside of graphs), d model width, v data tokens.
"""

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
from sedd_graph.diffusion.strings.flexmdm import MASKS_AND_DELETES, FlexDraw, FlexKernel
from sedd_graph.diffusion.strings.kernel import StringKernel, StringObjective, StringTable
from sedd_graph.diffusion.strings.sampler import StringSampler, StringWalk
from sedd_graph.diffusion.tokens.walk import T_MIN

from ..bijective._bijection import wide
from ..objectives.bounds import TimeConfig
from ._heads import Scalar
from .objectives import ClockObjective, NoiseLevel
from .samplers import Thinning

__all__ = ["FlexLoss", "FlexTau", "FlexThinning", "GapHead", "MaskDelete"]


class MaskDelete(FlexKernel, kind="string_kernel"):
    """Tokens become masks and masks are deleted; noise is the empty string (FlexMDM, arXiv 2509.01025). Generation inserts
    masks and unmasks them, in any order.

    With ``loglinear`` and ``pace: 1`` both schedules of the paper are linear.
    """

    class Config(ComponentConfig):
        pace: Annotated[float, pydantic.Field(ge=1, le=1000)] = 1.0
        """Rate of unmasking a mask, relative to the rate of inserting a missing token, from 1 to 1,000: 1 - b = (1 - a)^pace for the
        paper's two schedules. Larger values leave fewer masks at a time."""

    config: Config

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.flexmdm import FlexTable

        return FlexTable(self)

    @property
    def pace(self) -> float:
        return self.config.pace


class GapHead(Component, kind="head"):
    """``log_gap``: the log of the expected number of tokens missing behind each position, in float32 (FlexMDM)."""

    class Config(ComponentConfig):
        most: SizeField = 1024
        """Upper bound on the predicted number of missing tokens per gap."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = Scalar(self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        with full_precision(x):
            highest = math.log(self.config.most)
            return highest - F.softplus(highest - self.linear(wide(x)))


class FlexLoss(ClockObjective[FlexKernel, FlexDraw], kind="string_objective"):
    """The loss of FlexMDM (arXiv 2509.01025): cross-entropy at masks, and a divergence of the numbers of missing tokens in gaps.

    With expected numbers g and predictions ghat it is the sum over gaps of ghat - g + g log(g / ghat), at the rate of insertion, and
    ``pace`` times that rate times the divergence of the tokens under masks. It bounds the probability of the tokens and of their
    number.
    """

    class Config(TimeConfig):
        targets: Literal["exact", "sampled"] = "exact"
        """Regression targets in training. ``exact``: means over all ways in which the string can come from the clean one, by dynamic
        programming. ``sampled``: the masks and deletions that were drawn, as in the paper; unbiased, cheaper, more variance."""

    config: Config

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, FlexKernel) else MASKS_AND_DELETES

    def draw_at(self, batch: Batch, kernel: FlexKernel, level: NoiseLevel, random: Randomness) -> FlexDraw:
        sigma, slope, interval = level
        slope = slope if interval is None else interval * slope
        strings = kernel.sample(batch, sigma, random=random, width=1 + batch.width)
        sampled = interval is not None and self.config.targets == "sampled"
        target = kernel.sampled_target(batch, strings) if sampled else kernel.target(batch, strings)
        weights = (kernel.weights(sigma) * slope[:, None].double()).float()
        terms = vars(target) | {"constant": (weights * target.constant).sum(-1)}
        return FlexDraw(strings.tokens, strings.attend, sigma.float(), cut=strings.cut, weights=weights, **terms)

    def loss(self, outputs: Mapping[str, Tensor], draw: FlexDraw, kernel: FlexKernel) -> Tensor:
        log_gap = outputs["log_gap"].float().masked_fill(~draw.attend, 0.0)
        gaps = torch.where(draw.attend, log_gap.exp() - draw.missing * log_gap, 0.0).sum(-1)
        log_x0 = outputs["log_x0"].float().gather(-1, draw.symbols.transpose(1, 2)).transpose(1, 2)
        masks = -(draw.filled * log_x0).sum((1, 2))
        return draw.weights[:, 0] * gaps + draw.weights[:, 1] * masks + draw.constant


def _gaps(walk: StringWalk[FlexKernel], outputs: Mapping[str, Tensor]) -> Tensor:
    """Return the expected number of tokens missing in each gap, float64 [b, w]; 0 in gaps that are shut."""
    return outputs["log_gap"].double().exp() * (walk.strings.attend & ~walk.shut)


def _fill(walk: StringWalk[FlexKernel], outputs: Mapping[str, Tensor], where: Tensor) -> None:
    """Replace the masks at ``where`` bool [b, w] by tokens."""
    log_x0 = outputs["log_x0"].float()[where][:, : walk.kernel.data_tokens]
    if walk.allowed is not None:
        log_x0 = log_x0.masked_fill(~walk.allowed, -math.inf)
    walk.write(where, log_x0.softmax(-1))


def _put(walk: StringWalk[FlexKernel], follow: Tensor) -> None:
    """Insert ``follow`` int64 [b, w] masks in each gap, as far as there is room."""
    none = torch.zeros_like(walk.fixed)
    walk.rewrite(walk.fitting(follow, none), lambda place: torch.full_like(place, walk.kernel.mask), none)


def _finish(walk: StringWalk[FlexKernel], sigma: Tensor) -> None:
    """Replace all remaining masks, without insertions."""
    masks = walk.kernel.masks(walk.strings)
    if bool(masks.any()):
        _fill(walk, walk.outputs(sigma), masks)
    walk.end_step()


class FlexTau(StringSampler[FlexKernel], kind="string_sampler"):
    """Tau-leaping in steps of equal length in time (FlexMDM, arXiv 2509.01025).

    In each step every gap gets a Poisson number of masks, and every mask is unmasked with its probability. A last step replaces all
    remaining masks.
    """

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128
        """Number of steps, from 1 to 1,000,000."""

    config: Config

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
            walk.end_step()
        _finish(walk, levels[-1])


class FlexThinning(Thinning[FlexKernel], kind="string_sampler"):
    """Inserts or unmasks one mask at a time, at the event times of the reverse process: exact for the model's rates (as ``string_thinning``).

    ``clamped`` counts proposed rates that were too low; if there are none, samples have the model's distribution.
    """

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
