"""What the heads of strings share: logits of data tokens, and one number a position, both in float32 whatever autocast says.

Axes: b batch, l length, d model width, v data tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context

__all__ = ["Scalar", "TokenHead"]


class Scalar(nn.Linear):
    """[b, l] from [b, l, d], 0 at first, in the precision of what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))[..., 0]


class TokenHead(Component):
    """Logits of the data tokens, by weights of its own or the ``table`` of an embedding, which has the start state last."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        tokens, width = self.axis("v"), self.axis("d")
        self.weight = None if "table" in context.connected else nn.Parameter(torch.empty(tokens, width))
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(tokens))

    def logits(self, rows: Tensor, table: Tensor | None) -> Tensor:
        """[b, l, v] from ``rows`` [b, l, d], in their precision."""
        weight = self.weight if table is None else table[:-1]
        assert weight is not None
        return F.linear(rows, weight.to(rows.dtype), self.bias.to(rows.dtype))
