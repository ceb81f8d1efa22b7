"""FlexMDM (arXiv 2509.01025), masked diffusion of strings of variable length: kernel, head, objective and samplers.

Axes: b batch, w positions of a string (first the BOS token, which marks its beginning, then tokens and masks), d
model width, v data tokens. In the inputs and outputs of network components, w is called l.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

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
    """Kernel of FlexMDM: masks tokens and deletes masks; the prior is the empty string (arXiv 2509.01025).

    Generation starts from the empty string, inserts masks and unmasks them, in any order. With the schedule
    ``loglinear`` and ``pace: 1`` both schedules of the paper, of insertion and of unmasking, are linear.
    """

    class Config(ComponentConfig):
        pace: Annotated[float, pydantic.Field(ge=1, le=1000)] = 1.0
        """Rate of unmasking one mask divided by the rate of inserting one missing token, from 1 to 1,000. The paper's
        schedules a (insertion) and b (unmasking) then satisfy 1 - b = (1 - a)^pace. Larger values leave fewer masks in
        a noisy string."""

    config: Config
    toys: ClassVar[tuple[int, ...]] = (2, 3)

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.flexmdm import FlexTable

        return FlexTable(self)

    @property
    def pace(self) -> float:
        return self.config.pace


class GapHead(Component, kind="head"):
    """Head for missing tokens: ``log_gap`` [b, l], log of the expected number of tokens missing after each position.

    The output is float32 (FlexMDM, arXiv 2509.01025).
    """

    class Config(ComponentConfig):
        most: SizeField = 1024
        """Upper bound on the predicted number of tokens missing after a position."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = Scalar(self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        with full_precision(x):
            highest = math.log(self.config.most)
            return highest - F.softplus(highest - self.linear(wide(x)))


class FlexLoss(ClockObjective[FlexKernel, FlexDraw], kind="string_objective"):
    """Loss of FlexMDM, a bound on -log p of a string, its length included, nats per string (arXiv 2509.01025).

    Its first term is the sum over gaps of ghat - g + g log(g / ghat), where g is the expected number of tokens missing
    in the gap (the place after a position) and ghat the network's prediction; its weight is r, the rate at which
    generation inserts one missing token. The second term, of weight ``pace`` times r, is the sum over masks of the KL
    divergence KL(target || prediction) of the distributions of the token under the mask.
    """

    class Config(TimeConfig):
        targets: Literal["exact", "sampled"] = "exact"
        """Regression targets in training. ``exact``: means over all alignments of the noisy string with the clean
        string, by dynamic programming. ``sampled``: the masks and deletions that were drawn, as in the paper; unbiased
        and cheaper, with more variance."""

    config: Config

    @property
    def training_excess(self) -> bool:
        return self.config.targets == "sampled"

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
    """Return the predicted number of tokens missing in each gap, float64 [b, w]; 0 where insertion is not allowed."""
    return outputs["log_gap"].double().exp() * (walk.strings.attend & ~walk.shut)


def _fill(walk: StringWalk[FlexKernel], outputs: Mapping[str, Tensor], where: Tensor) -> None:
    """Unmask the positions ``where`` bool [b, w]: draw a token for each from ``log_x0``."""
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
    """Tau-leaping sampler of FlexMDM, with steps of equal length in time (arXiv 2509.01025).

    In each step a Poisson number of masks is inserted in every gap (after every position), and each mask is unmasked
    with the probability that the kernel gives for the step. A last step unmasks all remaining masks.
    """

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 128
        """Number of time steps before the last step, from 1 to 1,000,000."""

    config: Config

    def lacks(self, kernel: StringKernel, objective: StringObjective[Any, Any]) -> str | None:
        return None if isinstance(kernel, FlexKernel) else MASKS_AND_DELETES

    def walk(self, walk: StringWalk[FlexKernel], steps: int) -> None:
        times = torch.linspace(1.0, T_MIN, steps + 1, device=walk.fixed.device, dtype=torch.float64)
        levels = walk.schedule.sigma(times)[:, None].expand(-1, walk.rows)
        for now, after in itertools.pairwise(levels):
            outputs, chances = walk.outputs(now), walk.kernel.leap(now, after)
            # NaN and infinite rates are refused when tokens are written; torch.poisson must not meet them
            rates = (_gaps(walk, outputs) * chances[:, :1]).nan_to_num(nan=0.0, posinf=0.0)
            many = torch.poisson(rates, generator=walk.generator).long()
            masks = walk.kernel.masks(walk.strings)
            _fill(walk, outputs, masks & (walk.rand(*masks.shape) < chances[:, 1:]))
            _put(walk, many)
            walk.end_step()
        _finish(walk, levels[-1])


class FlexThinning(Thinning[FlexKernel], kind="string_sampler"):
    """Thinning sampler of FlexMDM: inserts or unmasks one mask at a time, at the event times of the reverse process.

    It has no time discretisation error: like ``string_thinning``, it proposes events at a rate above the model's and
    accepts some of them. ``clamped`` counts the events at which the proposed rate was too low; if it is 0, samples have
    the model's distribution.
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
