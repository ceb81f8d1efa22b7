"""Layers other than attention that combine neighbouring positions. Axes: b batch, l length, d model width."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField


class ShortConv(Component, kind="mixer"):
    """Depthwise convolution over the sequence, centred kernel of ``width`` positions, initialised to the identity.

    The input ``x`` and the output are [b, l, d]. The sequence is padded with zeros at both ends. The optional input
    ``attend``, bool [b, l], is False at padding; ``x`` is set to zero there before the convolution.

    Raises:
        ValueError: ``width`` is even.
    """

    class Config(ComponentConfig):
        width: SizeField = 3
        """Kernel size in positions; odd."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.config.width % 2 == 0:
            raise ValueError(f"short_conv needs an odd width, not {self.config.width}")
        weight = torch.zeros(self.axis("d"), 1, self.config.width)
        weight[:, :, self.config.width // 2] = 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Float[Tensor, "b l d"], attend: Bool[Tensor, "b l"] | None = None) -> Float[Tensor, "b l d"]:
        if attend is not None:
            x = x * attend[..., None].to(x.dtype)
        # shifted sums rather than conv1d: they are contiguous over d and fuse with their neighbours
        half = self.config.width // 2
        padded = F.pad(x, (0, 0, half, half))
        weight = self.weight[:, 0].to(x.dtype)
        out = padded[:, : x.shape[1]] * weight[:, 0]
        for offset in range(1, self.config.width):
            out = out + padded[:, offset : offset + x.shape[1]] * weight[:, offset]
        return out
