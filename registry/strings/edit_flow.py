"""Edit Flows (arXiv 2506.09018): kernel, substitution head and loss.

Axes: b rows, w positions of a noisy string (first the BOS token, which marks its beginning), c columns of an
alignment, d model width, v data tokens. In the inputs and outputs of network components, w is called l.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

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
    TOKENS,
    StringDraw,
    StringKernel,
    StringTable,
)

from ..bijective._bijection import wide
from ..noise._frequencies import FrequencyConfig, thinned, token_frequencies
from ..objectives.bounds import TimeConfig
from ._heads import Scalar, TokenHead
from .objectives import ClockObjective, NoiseLevel

__all__ = ["ColumnDraw", "EditFlow", "EditFlowLoss", "SubstitutionHead"]


class EditFlow(EditFlowKernel, kind="string_kernel"):
    """Kernel of Edit Flows: interpolates between an aligned noise string and clean string (arXiv 2506.09018).

    The two strings are aligned in columns, and each column switches from the clean token to the noise token
    independently. Generation inserts, deletes and substitutes tokens. The prior is a string of independent tokens whose
    length has a geometric distribution. With the default ``mean_length: 0`` the prior is the empty string: noisy
    strings are then distributed as under the kernel ``delete``, and generation only inserts.
    """

    class Config(FrequencyConfig):
        mean_length: Annotated[float, pydantic.Field(ge=0, le=65536)] = 0.0
        """Mean of the geometric distribution of the lengths of strings of the prior, in tokens, from 0 to 65,536;
        lengths above ``longest`` are then excluded. 0: the prior is the empty string."""
        longest: Annotated[int, pydantic.Field(ge=1, le=65536)] | None = None
        """Largest length of a string of the prior, in tokens, from 1 to 65,536; null: unlimited."""
        alignment: Literal["optimal", "padded"] = "optimal"
        """Alignment of the noise string with the clean string. ``optimal``: an alignment with the fewest edits;
        ``padded``: position by position from the left, the shorter string padded with blanks."""

    config: Config
    toys: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.register_buffer("law", token_frequencies(self.config, self.data_tokens), persistent=False)

    @classmethod
    def toy(cls, config: ComponentConfig, states: int) -> ComponentConfig:
        # all noise of the toy is enumerated
        given, most = cls.Config.model_validate(config), 3 if states <= TOKENS + 1 else 2
        short = {"mean_length": min(given.mean_length, 1.0), "longest": min(given.longest or most, most)}
        return thinned(config, states - 1).model_copy(update=short)

    @classmethod
    def parametrizations(cls, config: ComponentConfig) -> tuple[tuple[Output, ...], ...]:
        noisy = isinstance(config, EditFlow.Config) and config.mean_length > 0
        return ((LOG_INSERT, LOG_DELETE, LOG_SUBSTITUTE),) if noisy else ((LOG_INSERT,),)

    def table(self, *, one_length: bool) -> StringTable:
        from sedd_graph.verify.edit_flow import EditFlowTable

        return EditFlowTable(self)

    @property
    def spread(self) -> float:
        return self.config.mean_length / (1 + self.config.mean_length)

    @property
    def longest(self) -> int | None:
        return self.config.longest

    def align(self, noise: Tensor, clean: Tensor) -> Columns:
        return (align_optimal if self.config.alignment == "optimal" else align_padded)(noise, clean)


class SubstitutionHead(TokenHead, kind="head"):
    """Head for substitutions: ``log_substitute`` [b, l, v], log-probability that a token is noise in place of token v.

    Entry [b, i, v] is for the token at position i: generation replaces it by v at a rate of the exponential of this
    entry times a factor that depends on the noise level. The entry is the sum of two log-probabilities, in float32:
    that the token is to be replaced at all, and that v is the new token (a log-softmax over the data tokens other than
    the current one).

    The optional input ``table`` ties the output weights to a token embedding [v + 1, d]: they are all its rows but the
    last, which embeds the BOS token (the marker at position 0).
    """

    class Config(ComponentConfig):
        pass

    config: Config

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
    """Noisy strings of a batch, with the edits that turn each noisy string into its clean string.

    Attributes:
        left: The edits that turn the noisy strings into the clean strings, at most one for each of the c columns of the
            alignment: a :class:`~sedd_graph.diffusion.strings.columns.Remaining` of tensors [b, c], with the position,
            the new token and the kind of each edit.
        weights: float32 [b, 3], weights of the loss terms of insertions, deletions and substitutions.
    """

    left: Remaining
    weights: Tensor


class EditFlowLoss(ClockObjective[EditFlowKernel, ColumnDraw], kind="string_objective"):
    """Loss of Edit Flows, a bound on -log p, nats per string (arXiv 2506.09018, section 3).

    With u the exponentials of the network's outputs, one for each possible edit, the loss is w (sum of u over all
    possible edits - number of remaining edits - sum of log u over the remaining edits). The remaining edits turn the
    noisy string into the clean string; w = kappa' / (1 - kappa), where kappa is the paper's schedule. If the prior has
    tokens, the bound is loose: no network that depends on the noisy string alone attains -log p.
    """

    over = "noised"

    class Config(TimeConfig):
        max_weight: Annotated[float, pydantic.Field(gt=0, le=1e9)] | None = 20.0
        """Upper limit on the weight w in training, at most 1e9, which limits gradients at small noise; null: no limit.
        Evaluation of the bound has no limit."""
        room: Annotated[float, pydantic.Field(ge=1, le=64)] = 2.0
        """Largest length of noisy strings in training as a multiple of the length of clean rows, from 1 to 64, if the
        prior has tokens. Tokens beyond the limit are dropped and counted. Evaluation of the bound uses whole
        strings."""

    config: Config

    def lacks(self, kernel: StringKernel) -> str | None:
        return None if isinstance(kernel, EditFlowKernel) else EDIT_FLOWS

    def caveat(self, kernel: EditFlowKernel) -> str | None:
        if not kernel.spread:
            return None
        return (
            "a loose bound: it includes the cost of pairing text with random noise, whatever the network. "
            "Compare it with bounds of the same process alone"
        )

    def training_factor(self, kernel: EditFlowKernel, schedule: Schedule, t: Tensor) -> Tensor:
        if self.config.max_weight is None:
            return torch.ones_like(t)
        weight = kernel.weights(schedule.sigma(t).double())[:, 0] * schedule.dsigma(t).double()
        return (self.config.max_weight / weight).clamp(max=1)

    def draw_at(self, batch: Batch, kernel: EditFlowKernel, level: NoiseLevel, random: Randomness) -> ColumnDraw:
        (sigma, slope, interval), width = level, None
        weights = kernel.weights(sigma.double()) * slope.double()[:, None]
        if interval is not None:
            width = 1 + (round(batch.width * self.config.room) if kernel.spread else batch.width)
            weights = interval * (
                weights if self.config.max_weight is None else weights.clamp(max=self.config.max_weight)
            )
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
    """Return the loss of one kind of edit without its factor, nats, [b].

    Args:
        log_u: The network's output, [b, w, v].
        where: bool [b, w], positions at which such edits are possible.
        left: bool [b, c], columns whose remaining edit is of this kind.
        place: int64 [b, c], positions of the edits.
        token: int64 [b, c], their new tokens.
    """
    log_u = log_u.float().masked_fill(~where[..., None], 0.0)
    total = torch.where(where, log_u.exp().sum(-1), 0.0).sum(-1)
    found = log_u.flatten(1).gather(1, place * log_u.shape[-1] + token)
    return total - torch.where(left, 1 + found, 0.0).sum(-1)
