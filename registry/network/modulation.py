"""adaLN-zero (DiT, arXiv 2212.09748, section 3.2): shift, scale and gate from a conditioning vector, zero at the start.

Axes: b batch, l length, d model width, e conditioning width.
"""

from typing import Annotated

import pydantic
from jaxtyping import Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.counter_rng import dropout


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map that starts as zero."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class AdaLNModulate(Component, kind="modulation"):
    """``x * (1 + scale(c)) + shift(c)``: to be put behind a norm. It starts as the identity."""

    positionwise = True

    class Config(ComponentConfig):
        pass

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = zero_linear(self.axis("e"), 2 * self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b e"]) -> Float[Tensor, "b l d"]:
        shift, scale = self.linear(c)[:, None].chunk(2, dim=-1)
        return x * (1 + scale) + shift


class AdaLNGate(Component, kind="modulation"):
    """``residual + gate(c) * dropout(x)``: closes a branch. It starts as the residual alone.

    Without a ``residual`` it gives the branch itself, for a sum that stands in the graph (where it can be undone).
    """

    positionwise = True

    class Config(ComponentConfig):
        dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = zero_linear(self.axis("e"), self.axis("d"))

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        c: Float[Tensor, "b e"],
        residual: Float[Tensor, "b l d"] | None = None,
        key: Tensor | None = None,
    ) -> Float[Tensor, "b l d"]:
        if key is not None and self.config.dropout:
            x = dropout(x, self.config.dropout, key)
        gated = self.linear(c)[:, None] * x
        return gated if residual is None else residual + gated
