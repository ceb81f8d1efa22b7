"""Output heads: log scores (SEDD) or log probabilities of the clean token (SUBS of MDLM), in nats, from hidden vectors.

Computed in float32 even under autocast, including the linear map: in bfloat16, log probabilities near -10 would be
spaced 0.06 apart. On a GPU the factors of the linear map are rounded to TF32, its output is not. Axes: b batch, l length, d model width, v states (a mask is the last state).
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.diffusion.numerics import FLOOR, log_expm1

from ._shared import Bias
from ._tf32 import head_linear

__all__ = ["LogitsHead", "ScoreHead", "X0Head"]

Init = Literal["zero", "normal"]


class _Head(Component):
    """Base class of heads: a linear map to states, whose weight is ``table`` if that port is connected."""

    positionwise = True
    config: "LogitsHead.Config | ScoreHead.Config | X0Head.Config"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        states = self.axis("v")
        if "table" not in context.connected:
            self.weight = nn.Parameter(torch.empty(states, self.axis("d")))
            if self.config.init == "zero":
                nn.init.zeros_(self.weight)
            else:
                nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(states)) if self.config.bias == "all" else None

    def logits(self, x: Tensor, table: Tensor | None) -> Tensor:
        """Return logits [b, l, v], float32, from hidden vectors ``x`` [b, l, d]."""
        return head_linear(x, self.weight if table is None else table, self.bias)


class ScoreHead(_Head, kind="head"):
    """Log score of every state at every position, nats; 0 for the current token (SEDD, arXiv 2310.16834)."""

    class Config(ComponentConfig):
        scale: Literal["absorb", "none"] = "absorb"
        """Scaling of the score by the noise level. ``absorb``, for the absorbing kernel, subtracts
        ``log(expm1(sigma)) + log(v - 1)`` from the log score, where v is the number of states, so that the scores of an
        untrained network have the right magnitude (``scale_by_sigma`` of the SEDD code, in float32); ``none``: no
        scaling."""
        bias: Bias = "all"
        """Bias of the linear map: ``all`` or ``none``."""
        init: Init = "zero"
        """Initialisation of the weight: ``zero``, or ``normal`` with standard deviation 0.02. Ignored if the input
        ``table``, a tied token embedding, is connected."""

    config: Config

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        tokens: Int[Tensor, "b l"],
        sigma: Float[Tensor, "b"],
        table: Float[Tensor, "v d"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        """Compute log scores from hidden vectors.

        Args:
            x: Hidden vectors, [b, l, d].
            tokens: Noised sequence x_t, [b, l].
            sigma: Total noise of each row, [b], nats.
            table: Weight shared with another component, such as the token embedding's table, [v, d]; None: the head's
                own weight.

        Returns:
            Log scores, [b, l, v], nats, float32.
        """
        log_score = self.logits(x, table)
        if self.config.scale == "absorb":
            log_score = log_score - log_expm1(sigma.float())[:, None, None] - math.log(log_score.shape[-1] - 1)
        return log_score.scatter(-1, tokens[..., None], 0.0)


class X0Head(_Head, kind="head"):
    """Log probability of each clean token at each position, nats (SUBS of MDLM, arXiv 2406.07524, section 3.2.3)."""

    class Config(ComponentConfig):
        mask: Literal["last", "hidden", "none"] = "last"
        """Treatment of the mask state. ``last``: the last state is the mask, which has probability 0, and an unmasked
        position keeps its token. ``hidden``: the mask has probability 0, but unmasked positions are predicted too, for
        kernels that also replace tokens (``mixture``). ``none``: log-softmax over all states, for kernels without a
        mask."""
        bias: Bias = "all"
        """Bias of the linear map: ``all`` or ``none``."""
        init: Init = "zero"
        """Initialisation of the weight: ``zero``, or ``normal`` with standard deviation 0.02. Ignored if the input
        ``table``, a tied token embedding, is connected."""

    config: Config

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        tokens: Int[Tensor, "b l"],
        table: Float[Tensor, "v d"] | None = None,
    ) -> Float[Tensor, "b l v"]:
        """Compute log probabilities of the clean tokens from hidden vectors.

        Args:
            x: Hidden vectors, [b, l, d].
            tokens: Noised sequence x_t, [b, l].
            table: Weight shared with another component, such as the token embedding's table, [v, d]; None: the head's
                own weight.

        Returns:
            Log probabilities, [b, l, v], nats, float32.
        """
        logits = self.logits(x, table)
        if self.config.mask == "none":
            return logits.log_softmax(-1)
        mask = logits.shape[-1] - 1
        states = torch.arange(mask + 1, device=logits.device)
        log_x0 = logits.masked_fill(states == mask, FLOOR).log_softmax(-1)
        if self.config.mask == "hidden":
            return log_x0
        carried = torch.where(states == tokens[..., None], 0.0, FLOOR)
        return torch.where((tokens == mask)[..., None], log_x0, carried)


class LogitsHead(_Head, kind="head"):
    """Logits of every token at every position, for a network that predicts tokens from noisy vectors (LangFlow)."""

    class Config(ComponentConfig):
        bias: Bias = "all"
        """Bias of the linear map: ``all`` or ``none``."""
        init: Init = "zero"
        """Initialisation of the weight: ``zero``, or ``normal`` with standard deviation 0.02. Ignored if the input
        ``table``, a tied token embedding, is connected."""

    config: Config

    def forward(self, x: Float[Tensor, "b l d"], table: Float[Tensor, "v d"] | None = None) -> Float[Tensor, "b l v"]:
        return self.logits(x, table)
