"""adaLN-zero (DiT, arXiv 2212.09748, section 3.2): shift, scale and gate from a conditioning vector, initially zero.

Axes: b batch, l length, d model width, e conditioning width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.counter_rng import dropout

from ._shared import DropoutRate


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a ``torch.nn.Linear`` from ``inputs`` to ``outputs`` features whose weight and bias are zero."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class AdaLNModulate(Component, kind="modulation"):
    """adaLN modulation ``x * (1 + scale(c)) + shift(c)`` of activations by a conditioning vector, for use after a norm.

    Here ``x`` is [b, l, d], ``c`` is [b, e], and ``scale`` and ``shift`` are linear maps from width e to d. They are
    initialised to zero, so the modulation is at first the identity.
    """

    positionwise = True

    class Config(ComponentConfig):
        pass

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.linear = zero_linear(self.axis("e"), 2 * self.axis("d"))

    def forward(self, x: Float[Tensor, "b l d"], c: Float[Tensor, "b e"]) -> Float[Tensor, "b l d"]:
        shift, scale = torch.chunk(self.linear(c)[:, None], 2, dim=-1)
        return x * (1 + scale) + shift


class AdaLNGate(Component, kind="modulation"):
    """adaLN gate ``residual + gate(c) * dropout(x)`` at the end of a residual branch; ``gate`` is initialised to zero.

    The branch ``x`` and ``residual`` are [b, l, d], the conditioning vector ``c`` is [b, e], and ``gate`` is a linear
    map from width e to d. If ``residual`` is not connected, the output is ``gate(c) * dropout(x)``. In a reversible
    block, use this form and add the residual with the component ``add``, through which inverses are derived.
    """

    positionwise = True

    class Config(ComponentConfig):
        dropout: DropoutRate = 0.0
        """Probability that an entry of ``x`` is dropped in training, in [0, 1)."""

    config: Config

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
        gated: Tensor = self.linear(c)[:, None] * x
        return gated if residual is None else residual + gated
