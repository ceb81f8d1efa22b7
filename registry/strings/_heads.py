"""Layers shared by the heads of strings: logits of data tokens, and one number per position.

Axes: b batch, l length, d model width, v data tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context

__all__ = ["Scalar", "TokenHead"]


class Scalar(nn.Linear):
    """Linear map from [b, l, d] to [b, l], 0 at initialisation, in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))[..., 0]


class TokenHead(Component):
    """Logits of the data tokens, with weights of its own or tied to the ``table`` of an embedding, whose last row is the start state."""

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        tokens, width = self.axis("v"), self.axis("d")
        self.weight = None if "table" in context.connected else nn.Parameter(torch.empty(tokens, width))
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(tokens))

    def logits(self, rows: Tensor, table: Tensor | None) -> Tensor:
        """Return the logits [b, l, v] of ``rows`` [b, l, d], in their dtype; ``table`` [v + 1, d] if it is connected.

        Raises:
            ValueError: The head has no weights of its own, and ``table`` is None.
        """
        weight = self.weight if table is None else table[:-1]
        if weight is None:
            raise ValueError("this head was made with a connected table, and got none")
        return F.linear(rows, weight.to(rows.dtype), self.bias.to(rows.dtype))
