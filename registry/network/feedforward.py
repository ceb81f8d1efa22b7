"""Position-wise networks. Axes: b batch, l length, d model width."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField


def _gelu(x: Tensor) -> Tensor:
    """GELU's tanh form. (1 + tanh u)/2 = sigmoid(2u), and a compiled sigmoid costs half of a compiled tanh on a CPU."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class FeedForward(Component, kind="feedforward"):
    """Linear, activation, linear. ``hidden`` is 4 d where it is not given."""

    positionwise = True

    class Config(ComponentConfig):
        hidden: SizeField | None = None
        activation: Literal["gelu", "swiglu", "squared_relu"] = "gelu"
        """``gelu``: the tanh form; ``swiglu``: arXiv 2002.05202; ``squared_relu``: arXiv 2109.08668."""
        bias: Literal["none", "all"] = "all"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.axis("d")
        hidden = self.config.hidden or 4 * width
        bias = self.config.bias == "all"
        self.up = nn.Linear(width, hidden * (2 if self.config.activation == "swiglu" else 1), bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        h = self.up(x)
        if self.config.activation == "gelu":
            h = _gelu(h)
        elif self.config.activation == "squared_relu":
            h = F.relu(h).square()
        else:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        out: Tensor = self.down(h)
        return out
