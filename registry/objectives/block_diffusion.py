"""Block diffusion (BD3-LM, arXiv 2503.09573): the bound of text that is written block by block, each given all before it.

One pass gives it for all blocks of a row: the network is given the noised row and the clean one, and ``sees`` lets a noised
block look at itself and at clean blocks before it. :mod:`sedd_graph.diffusion.tokens.block_diffusion` says which position sees which.

Axes: b batch, l length, k blocks of a row, d width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.block_diffusion import BLOCK_FEEDS, block_inputs
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective
from sedd_graph.errors import UserError

from .bounds import Nelbo, TimeConfig

Rate = Annotated[float, pydantic.Field(ge=0, le=1)]


class JoinClean(Component, kind="arithmetic"):
    """Noised tokens, and behind them the clean ones: what the network of a block model looks at."""

    moves = True

    class Config(ComponentConfig):
        pass

    def forward(self, tokens: Int[Tensor, "b l"], clean: Int[Tensor, "b l"]) -> Int[Tensor, "b 2*l"]:
        return torch.cat([tokens, clean], dim=1)


class TakeNoised(Component, kind="arithmetic"):
    """The part of ``x`` that stands for noised ``tokens``: what is said of the clean ones is of no use to the head."""

    moves = True

    class Config(ComponentConfig):
        pass

    def forward(self, x: Float[Tensor, "b 2*l d"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return x[:, : tokens.shape[1]]


class BlockNelbo(Objective, kind="objective"):
    """The sum over blocks of a bound on -log p(block | all blocks before it), each block noised to a level of its own (BD3-LM, arXiv 2503.09573, eq. 7).

    With blocks of one token it is -log p of an autoregressive model, without error; with one block, the bound of ``nelbo``.
    ``clip`` keeps the masked shares of training within two bounds, where the gradient varies least (section 5; the paper's
    are 0.3 and 0.8 for blocks of 16, 0.45 and 0.95 for blocks of 4). Such a training loss is no bound; evaluation draws them all.
    """

    reads = ("log_x0",)
    needs_mask = True
    over = "masked"  # in the form that evaluation takes
    feeds = BLOCK_FEEDS

    class Config(TimeConfig):
        block: Annotated[int, pydantic.Field(ge=1, le=2**20)] = 16
        clip: tuple[Rate, Rate] | None = None

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> "BlockNelbo.Config":
            if self.clip is not None and self.clip[0] >= self.clip[1]:
                raise ValueError(f"clip goes from the lower share to the higher, not from {self.clip[0]:g} to {self.clip[1]:g}")  # fmt: skip
            return self

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.within: Objective = Nelbo(
            Nelbo.Config(times=self.config.times, t_min=self.config.t_min), context
        )  # of one block

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        return config.model_copy(update={"block": 2, "clip": None})

    @property
    def block(self) -> int:
        return self.config.block

    # -- rows of blocks as rows -------------------------------------------------------------------------------------

    def _parted(self, x: Tensor) -> Tensor:
        """[b, l, ...] as [b k, block, ...]."""
        return x.unflatten(1, (-1, self.block)).flatten(0, 1)

    def _blocks(self, batch: Batch, random: Randomness) -> tuple[Batch, Randomness]:
        length = batch.width
        if length % self.block:
            raise UserError(
                f"rows of {length} tokens are no whole number of blocks of {self.block}: "
                "choose a data.length that is a multiple of objective.block"
            )
        k = length // self.block
        parts = Batch(*(self._parted(getattr(batch, f.name)) for f in dataclasses.fields(batch)))
        total = None if random.total is None else random.total * k
        return parts, Randomness(random.generator, start=random.start * k, total=total)

    def _joined(self, draw: Draw, rows: int) -> Draw:
        """``xt`` [b k, block] as [b, l], all else [b k] as [b, k]."""
        return Draw(*(getattr(draw, f.name).reshape(rows, -1) for f in dataclasses.fields(draw)))

    def corrupt(
        self,
        batch: Batch,
        kernel: Kernel,
        schedule: Schedule,
        *,
        random: Randomness,
        t: Tensor | None = None,
        xt: Tensor | None = None,
    ) -> Draw:
        """As of any objective, but that each of a row's k blocks has a time of its own: ``t`` is [b] or [b, k]."""
        parts, own = self._blocks(batch, random)
        rows, k = len(batch), len(parts) // len(batch)
        if t is not None:
            t = t.reshape(rows, -1).expand(rows, k).flatten()
        elif self.config.clip is not None:
            share = torch.tensor(self.config.clip, dtype=torch.float64, device=batch.tokens.device)
            low, high = schedule.time(-torch.log1p(-share)).clamp(min=self.config.t_min).float()
            even = self.config.times == "low_discrepancy"
            u = own.low_discrepancy(rows * k) if even else own.rand(rows * k)
            t = low + (high - low) * u.to(batch.tokens.device)
        xt = None if xt is None else self._parted(xt)
        return self._joined(self.within.corrupt(parts, kernel, schedule, random=own, t=t, xt=xt), rows)

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        parted = {"log_x0": self._parted(outputs["log_x0"])}
        parts = Batch(*(self._parted(getattr(batch, f.name)) for f in dataclasses.fields(batch)))
        flat = Draw(self._parted(draw.xt), *(x.flatten() for x in (draw.t, draw.sigma, draw.dsigma, draw.weight)))
        return self.within.loss(parted, flat, parts, kernel, schedule).view(len(batch), -1).sum(1)

    def inputs(self, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        return block_inputs(draw.xt, batch.tokens, block=self.block)

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        parts, own = self._blocks(batch, random)
        within, draw = self.within.bound_draw(parts, kernel, schedule, random=own)
        made = BlockNelbo(self.config, self.context)
        made.within = within
        return made, self._joined(draw, len(batch))
