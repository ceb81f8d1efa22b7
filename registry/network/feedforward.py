"""Position-wise feed-forward networks. Axes: b batch, l length, d model width."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField

from ._shared import Bias


def _gelu(x: Tensor) -> Tensor:
    """Return the tanh approximation of GELU.

    When compiled, computes ``x sigmoid(2u)``, using (1 + tanh u)/2 = sigmoid(2u), in half the time on a CPU.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class FeedForward(Component, kind="feedforward"):
    """Position-wise feed-forward network: linear map, activation, linear map (arXiv 1706.03762, section 3.3)."""

    positionwise = True

    class Config(ComponentConfig):
        hidden: SizeField | None = None
        """Width between the two linear maps; by default 4 times the model width."""
        activation: Literal["gelu", "gelu_exact", "swiglu", "squared_relu"] = "gelu"
        """Activation. ``gelu``: tanh approximation (arXiv 1606.08415); ``gelu_exact``: by the error function, as in BERT;
        ``swiglu``: gated, with a first map of twice the width (arXiv 2002.05202); ``squared_relu``: arXiv 2109.08668."""
        bias: Bias = "all"
        """Biases of both linear maps: ``all`` or ``none``."""

    config: Config

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
        elif self.config.activation == "gelu_exact":
            h = F.gelu(h)
        elif self.config.activation == "squared_relu":
            h = F.relu(h).square()
        else:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        out: Tensor = self.down(h)
        return out
