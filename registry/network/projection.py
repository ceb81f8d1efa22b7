"""Maps between vectors of two widths, and dropout. Axes: b batch, l length, d input width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.component.counter_rng import dropout

from ._shared import DropoutRate

__all__ = ["Dropout", "Projection"]


class Projection(Component, kind="feedforward"):
    """Map from one width to another: linear map, tanh, linear map (input and output maps of Diffusion-LM)."""

    positionwise = True

    class Config(ComponentConfig):
        width: SizeField
        """Width of the output."""
        hidden: SizeField | None = None
        """Width between the two linear maps; by default that of the output."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        hidden = self.config.hidden or self.config.width
        self.up = nn.Linear(self.axis("d"), hidden)
        self.down = nn.Linear(hidden, self.config.width)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l width"]:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


class Dropout(Component, kind="arithmetic"):
    """Dropout (arXiv 1207.0580): in training, each entry is 0 with probability ``rate`` and scaled up otherwise."""

    class Config(ComponentConfig):
        rate: DropoutRate = 0.1
        """Probability that an entry is dropped in training, in [0, 1)."""

    config: Config

    def forward(self, x: Float[Tensor, "b l d"], key: Tensor | None = None) -> Float[Tensor, "b l d"]:
        return x if key is None or not self.config.rate else dropout(x, self.config.rate, key)
