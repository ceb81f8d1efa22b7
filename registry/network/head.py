"""From vectors to what the noise process asks for: log scores (SEDD) or log probabilities of the clean token (SUBS).

Computed in float32 whatever autocast says, the linear map included. Axes: b batch, l length, d model width, v states (the mask is the last).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.diffusion.numerics import FLOOR, full_precision, log_expm1

from ..bijective._bijection import wide

__all__ = ["ScoreHead", "X0Head"]


class _Head(Component):
    positionwise = True

    def make_linear(self) -> None:
        states, width = self.axis("v"), self.axis("d")
        self.weight = None if "table" in self.context.connected else nn.Parameter(torch.empty(states, width))
        if self.weight is not None:
            if self.config.init == "zero":
                nn.init.zeros_(self.weight)
            else:
                nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(states)) if self.config.bias == "all" else None

    def raw(self, x: Tensor, table: Tensor | None) -> Tensor:
        weight = self.weight if table is None else table
        assert weight is not None
        # Autocast's product would come out rounded to bfloat16: log probabilities of -10 in steps of 0.06.
        with full_precision(x):
            rows = wide(x)
            return F.linear(rows, weight.to(rows.dtype), None if self.bias is None else self.bias.to(rows.dtype))


class ScoreHead(_Head, kind="head"):
    """Log score of each state at each position, in nats; 0 at the current token (SEDD code, ``scale_by_sigma``).

    ``scale: absorb`` subtracts ``log(expm1(sigma)) + log(v - 1)``, so that an untrained network starts with a total
    score of the right size; it is for the absorbing kernel. The SEDD code subtracts in bfloat16; this does not.
    """

    class Config(ComponentConfig):
        scale: Literal["absorb", "none"] = "absorb"
        bias: Literal["none", "all"] = "all"
        init: Literal["zero", "normal"] = "zero"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.make_linear()

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        tokens: Int[Tensor, "b l"],
        sigma: Float[Tensor, "b"],
        table: Float[Tensor, "v d"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        log_score = self.raw(x, table)
        if self.config.scale == "absorb":
            log_score = log_score - log_expm1(sigma.float())[:, None, None] - math.log(log_score.shape[-1] - 1)
        return log_score.scatter(-1, tokens[..., None], 0.0)


class X0Head(_Head, kind="head"):
    """Log probability of the clean token, in nats (MDLM's SUBS rule, arXiv 2406.07524, section 3.2.3).

    ``mask: last``: the last state is the mask; it never comes out, and a token that is not masked is carried over.
    ``mask: hidden``: it never comes out, but nothing is carried over, for kernels that also replace tokens (``mixture``).
    ``mask: none``: a plain log softmax over all states, for kernels without a mask.
    """

    class Config(ComponentConfig):
        mask: Literal["last", "hidden", "none"] = "last"
        bias: Literal["none", "all"] = "all"
        init: Literal["zero", "normal"] = "zero"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.make_linear()

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        tokens: Int[Tensor, "b l"],
        table: Float[Tensor, "v d"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        logits = self.raw(x, table)
        if self.config.mask == "none":
            return logits.log_softmax(-1)
        mask = logits.shape[-1] - 1
        states = torch.arange(mask + 1, device=logits.device)
        log_x0 = logits.masked_fill(states == mask, FLOOR).log_softmax(-1)
        if self.config.mask == "hidden":
            return log_x0
        carried = torch.where(states == tokens[..., None], 0.0, FLOOR)
        return torch.where((tokens == mask)[..., None], log_x0, carried)
