"""Edit Flows (arXiv 2506.09018): the kernel, the head that says what a token is to become, and the loss.

Axes: b rows, w positions (the start state first; l in a graph), c columns, d model width, v data tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.base import ComponentConfig, Context
from sedd_graph.component.outputs import Output
from sedd_graph.diffusion.batch import Batch, Randomness
from sedd_graph.diffusion.numerics import FLOOR, full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.strings.columns import Columns, Remaining, align_optimal, align_padded
from sedd_graph.diffusion.strings.edit_flow import EDIT_FLOWS, EditFlowKernel
from sedd_graph.diffusion.strings.kernel import (
    LOG_DELETE,
    LOG_INSERT,
    LOG_SUBSTITUTE,
    StringDraw,
    StringKernel,
    StringObjective,
    StringTable,
)

from ..bijective._bijection import wide
from ..noise._frequencies import FrequencyConfig, thinned, token_frequencies
from ..objectives.bounds import TimeConfig
from ._heads import Scalar, TokenHead

__all__ = ["ColumnDraw", "EditFlow", "EditFlowLoss", "SubstitutionHead"]


class EditFlow(EditFlowKernel, kind="string_kernel"):
    """Text and noise are put in columns, each of which goes over by itself (Edit Flows, arXiv 2506.09018). Generation inserts,
    deletes and replaces.

    Noise is a string of independent tokens by frequency, of geometric length around ``mean_length``. By default it is the empty
    string: then noisy text is that of ``delete``, and generation only inserts.
    """

    class Config(FrequencyConfig):
        mean_length: Annotated[float, pydantic.Field(ge=0, le=65536)] = 0.0
        """Mean length of noise, in tokens; 0: the empty string."""
        longest: Annotated[int, pydantic.Field(ge=1, le=65536)] | None = None
        """Noise has no more tokens than this (the geometric law given that); null: any number."""
        alignment: Literal["optimal", "padded"] = "optimal"
        """``optimal``: as few edits as can be. ``padded``: place by place from the left, the longer string's rest beside blanks."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("law", token_frequencies(self.config, self.data_tokens), persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        found = thinned(config, states - 1)
        assert isinstance(found, cls.Config)
        # all noise of a toy is enumerated
        return found.model_copy(
            update={"mean_length": min(found.mean_length, 1.0), "longest": min(found.longest or 3, 3)}
        )

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        noisy = isinstance(config, EditFlow.Config) and config.mean_length > 0
        return ((LOG_INSERT, LOG_DELETE, LOG_SUBSTITUTE),) if noisy else ((LOG_INSERT,),)

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.edit_flow import EditFlowTable

        return EditFlowTable(self)

    @property
    def spread(self) -> float:
        length: float = self.config.mean_length
        return length / (1 + length)

    @property
    def longest(self) -> int | None:
        most: int | None = self.config.longest
        return most

    def align(self, noise: Tensor, clean: Tensor) -> Columns:
        return (align_optimal if self.config.alignment == "optimal" else align_padded)(noise, clean)


class SubstitutionHead(TokenHead, kind="head"):
    """What the token at each position is to become: log softmax over all other data tokens plus the log chance that it is to
    become another at all, in float32. ``table`` is the embedding of a token and the start state, of which the data tokens are used."""

    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.chance = Scalar(self.axis("d"))

    def forward(
        self, x: Float[Tensor, "b l d"], tokens: Int[Tensor, "b l"], table: Float[Tensor, "v+1 d"] | None = None
    ) -> Float[Tensor, "b l v"]:
        with full_precision(x):
            rows = wide(x)
            which = self.logits(rows, table)
            same = torch.arange(which.shape[-1], device=x.device) == tokens[..., None]
            return which.masked_fill(same, FLOOR).log_softmax(-1) + F.logsigmoid(self.chance(rows))[..., None]


@dataclasses.dataclass(frozen=True)
class ColumnDraw(StringDraw):
    """A draw with the edits that are left to do. ``weights`` float32 [b, 3]: what the terms of insertions, deletions and
    substitutions are multiplied by."""

    left: Remaining
    weights: Tensor


class EditFlowLoss(StringObjective[EditFlowKernel, ColumnDraw], kind="string_objective"):
    """The loss of Edit Flows (arXiv 2506.09018, section 3), less what does not depend on the network, so that it bounds -log p.

    Of w = kappa' / (1 - kappa) and what the heads say, u: w (sum of u over all edits - edits left to do - sum of log u over
    these), nats per string. With noise of its own the bound is loose: no network that sees one string can make it -log p.
    """

    over = "noised"

    class Config(TimeConfig):
        max_weight: Annotated[float, pydantic.Field(gt=0, le=1e9)] | None = 20.0
        """In training no w is more than this, which holds gradients from near clean text down; null: as it is. Bounds are
        never cut."""
        room: Annotated[float, pydantic.Field(ge=1, le=64)] = 2.0
        """Noisy rows hold this many times the tokens of a clean one in training, where noise has tokens; what does not fit is
        cut off and counted. Bounds are of whole strings."""

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, EditFlowKernel) else EDIT_FLOWS

    def caveat(self, kernel: EditFlowKernel) -> str | None:
        if not kernel.spread:
            return None
        return (
            "a loose bound: text and noise are paired at random, and what that costs is counted, whatever the network. "
            "Compare it with bounds of the same process alone"
        )

    def corrupt(
        self, batch: Batch, kernel: EditFlowKernel, schedule: Schedule, *, random: Randomness, t: Tensor | None = None
    ) -> ColumnDraw:
        t, width = self.config.draw(batch, random, t)
        room = round(batch.width * self.config.room) if kernel.spread else batch.width
        sigma, pace = schedule.sigma(t), self._pace(kernel, schedule, t)
        pace = pace if self.config.max_weight is None else pace.clamp(max=self.config.max_weight)
        return self._draw(batch, kernel, sigma, width * pace, random, width=1 + room)

    def _pace(self, kernel: EditFlowKernel, schedule: Schedule, t: Tensor) -> Tensor:
        """w of each kind of edit at ``t`` [b], per unit of t, [b, 3]."""
        return kernel.weights(schedule.sigma(t).double()) * schedule.dsigma(t).double()[:, None]

    def capped(self, kernel: EditFlowKernel, schedule: Schedule) -> float:
        t = torch.linspace(self.config.t_min, 1, 10_000, dtype=torch.float64)
        most = self.config.max_weight
        return 0.0 if most is None else float((self._pace(kernel, schedule, t) > most).double().mean())

    def bound_draw(self, batch: Batch, kernel: EditFlowKernel, schedule: Schedule, *, random: Randomness) -> ColumnDraw:
        u = random.low_discrepancy(len(batch)).double().to(batch.tokens.device).clamp(min=1e-9)
        end = float(schedule.sigma(torch.ones(1, dtype=torch.float64)))
        sigma, slope = kernel.clock(u)
        draw = self._draw(batch, kernel, sigma, kernel.weights(sigma) * slope[:, None], random, width=None)
        # beyond the end of the schedule the network is told of the end: it has never seen more
        return dataclasses.replace(draw, sigma=draw.sigma.clamp(max=end))

    def _draw(
        self,
        batch: Batch,
        kernel: EditFlowKernel,
        sigma: Tensor,
        weights: Tensor,
        random: Randomness,
        *,
        width: int | None,
    ) -> ColumnDraw:
        strings, left = kernel.sample(batch, sigma, random=random, width=width)
        return ColumnDraw(
            strings.tokens, strings.attend, sigma.float(), left=left, weights=weights.float(), cut=strings.cut
        )

    def loss(self, outputs: Mapping[str, Tensor], draw: ColumnDraw, kernel: EditFlowKernel) -> Tensor:
        left, token = draw.left, draw.attend & (torch.arange(draw.attend.shape[1], device=draw.attend.device) > 0)
        insert = _term(outputs["log_insert"], draw.attend, left.insert, left.place, left.token)
        if not kernel.spread:
            return draw.weights[:, 0] * insert
        delete = _term(outputs["log_delete"][..., None], token, left.delete, left.place, torch.zeros_like(left.place))
        substitute = _term(outputs["log_substitute"], token, left.substitute, left.place, left.token)
        return (draw.weights * torch.stack([insert, delete, substitute], -1)).sum(-1)


def _term(log_u: Tensor, where: Tensor, left: Tensor, place: Tensor, token: Tensor) -> Tensor:
    """Of one kind of edit: the sum of u over all of ``where`` [b, w], less edits ``left`` [b, c] and the log of u at these.
    ``log_u`` is [b, w, v]."""
    said = log_u.float().masked_fill(~where[..., None], 0.0)
    total = torch.where(where, said.exp().sum(-1), 0.0).sum(-1)
    found = said.flatten(1).gather(1, place * said.shape[-1] + token)
    return total - torch.where(left, 1 + found, 0.0).sum(-1)
