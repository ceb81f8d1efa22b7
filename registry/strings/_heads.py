"""Layers shared by the heads for strings: token logits, and one scalar per position.

Axes: b batch, l length, d model width, v data tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context

__all__ = ["Scalar", "TokenHead"]


class Scalar(nn.Linear):
    """Linear layer with one output per position: [b, l, d] to [b, l], in the dtype of the input; initialised to 0."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))[..., 0]


class TokenHead(Component):
    """Base class of heads with token logits, whose output weights are trained separately or tied to an embedding.

    The weights are tied if the input ``table`` is connected: a token embedding [v + 1, d] whose last row is the start
    state, the marker at position 0 of every string.
    """

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        tokens, width = self.axis("v"), self.axis("d")
        self.weight = None if "table" in context.connected else nn.Parameter(torch.empty(tokens, width))
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(tokens))

    def logits(self, rows: Tensor, table: Tensor | None) -> Tensor:
        """Return the logits of the data tokens.

        Args:
            rows: Activations, [b, l, d].
            table: Token embedding that the output weights are tied to, [v + 1, d]; None: the head's own weights.

        Returns:
            Logits, [b, l, v], in the dtype of ``rows``.

        Raises:
            ValueError: The head has no output weights of its own, and ``table`` is None.
        """
        weight = self.weight if table is None else table[:-1]
        if weight is None:
            raise ValueError("this head was made with a connected table, and got none")
        return F.linear(rows, weight.to(rows.dtype), self.bias.to(rows.dtype))
