"""Block diffusion (BD3-LM, arXiv 2503.09573): the bound of text that is generated block by block, each given all earlier ones.

One network evaluation serves all blocks of a row: its inputs are the noisy row and the clean one, and in the attention mask
``sees`` a noisy block attends to itself and to the clean blocks before it (:mod:`sedd_graph.diffusion.tokens.block_diffusion`).

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
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective
from sedd_graph.errors import UserError

from .bounds import Nelbo, TimeConfig, uniform

Rate = Annotated[float, pydantic.Field(ge=0, le=1)]


class JoinClean(Component, kind="arithmetic"):
    """Concatenates noisy and clean tokens, the input of the network of a block model."""

    moves = True

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, tokens: Int[Tensor, "b l"], clean: Int[Tensor, "b l"]) -> Int[Tensor, "b 2*l"]:
        return torch.cat([tokens, clean], dim=1)


class TakeNoised(Component, kind="arithmetic"):
    """Selects the positions of noisy ``tokens`` from ``x``; the head does not need those of clean ones."""

    moves = True

    class Config(ComponentConfig):
        pass

    config: Config

    def forward(self, x: Float[Tensor, "b 2*l d"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        return x[:, : tokens.shape[1]]


class BlockNelbo(Objective, kind="objective"):
    """The sum over blocks of a bound on -log p(block | earlier blocks), each at a noise level of its own (BD3-LM, arXiv 2503.09573, eq. 7).

    With blocks of one token it is the exact -log p of an autoregressive model; with one block, the bound of ``nelbo``. With
    ``clip`` the training loss is not a bound; evaluation draws all levels.
    """

    reads = ("log_x0",)
    needs_mask = True
    over = "masked"  # in the form of evaluation
    feeds = BLOCK_FEEDS

    class Config(TimeConfig):
        block: Annotated[int, pydantic.Field(ge=1, le=2**20)] = 16
        """Tokens per block, at least 1; ``data.length`` must be a multiple."""
        clip: tuple[Rate, Rate] | None = None
        """Lowest and highest share of masked tokens in training, each from 0 to 1, chosen for low variance of the gradient
        (section 5): in the paper 0.3 and 0.8 for blocks of 16, 0.45 and 0.95 for blocks of 4. null: all shares."""

        @pydantic.model_validator(mode="after")
        def _ordered(self) -> "BlockNelbo.Config":
            if self.clip is not None and self.clip[0] >= self.clip[1]:
                raise ValueError(f"clip goes from the lower share to the higher, not from {self.clip[0]:g} to {self.clip[1]:g}")  # fmt: skip
            return self

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.within: Objective = Nelbo(TimeConfig(times=self.config.times, t_min=self.config.t_min), context)

    @classmethod
    def toy(cls, config: ComponentConfig) -> ComponentConfig:
        return config.model_copy(update={"block": 2, "clip": None})

    @property
    def block(self) -> int:
        return self.config.block

    def _parted(self, x: Tensor) -> Tensor:
        """Return ``x`` [b, l, ...] as [b k, block, ...]."""
        return x.unflatten(1, (-1, self.block)).flatten(0, 1)

    def _parts(self, batch: Batch) -> Batch:
        """Return the batch of all blocks, b k rows."""
        return Batch(*(self._parted(getattr(batch, f.name)) for f in dataclasses.fields(batch)))

    def draw(self, request: DrawRequest) -> Draw:
        """Draw a time for each of a row's k blocks; a given ``t`` is [b] or [b, k]."""
        batch, random, t, xt = request.batch, request.random, request.t, request.xt
        rows, k = len(batch), batch.width // self.block
        if batch.width % self.block:
            raise UserError(
                f"rows of {batch.width} tokens are no whole number of blocks of {self.block}: "
                "choose a data.length that is a multiple of objective.block"
            )
        parts, total = self._parts(batch), None if random.total is None else random.total * k
        own = Randomness(random.generator, start=random.start * k, total=total)
        if t is not None:
            t = t.reshape(rows, -1).expand(rows, k).flatten()
        elif self.config.clip is not None:
            share = torch.tensor(self.config.clip, dtype=torch.float64, device=batch.tokens.device)
            low, high = request.schedule.time(-torch.log1p(-share)).clamp(min=self.config.t_min).float()
            t = low + (high - low) * uniform(self.config.times, parts, own)
        xt = None if xt is None else self._parted(xt)
        draw = self.within.draw(dataclasses.replace(request, batch=parts, random=own, t=t, xt=xt))
        # xt [b k, block] as [b, l], all others [b k] as [b, k]
        return Draw(*(getattr(draw, f.name).reshape(rows, -1) for f in dataclasses.fields(draw)))

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        parted = {"log_x0": self._parted(outputs["log_x0"])}
        flat = Draw(self._parted(draw.xt), *(x.flatten() for x in (draw.t, draw.sigma, draw.dsigma, draw.weight)))
        return self.within.loss(parted, flat, self._parts(batch), kernel, schedule).view(len(batch), -1).sum(1)

    def inputs(self, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        return block_inputs(draw.xt, batch.tokens, block=self.block)

    def evaluated(self, kernel: Kernel) -> Objective:
        made = BlockNelbo(self.config.model_copy(update={"clip": None}), self.context)
        made.within = self.within.evaluated(kernel)
        return made
