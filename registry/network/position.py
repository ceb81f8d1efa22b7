"""Position encodings: rotary angles for attention, and learned or sinusoidal vectors to add to embeddings.

Axes: b batch, l length, d model width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField


class Rotary(Component, kind="position"):
    """Rotary angles (RoFormer, arXiv 2104.09864): cosines and sines, computed once and shared by all attention layers.

    Only the length and device of the input ``x``, or of ``tokens`` in its place, are used.

    Raises:
        ValueError: ``dim`` is odd, or neither ``x`` nor ``tokens`` is connected.
    """

    class Config(ComponentConfig):
        dim: SizeField
        """Width of one attention head; even."""
        base: float = 10000.0
        """Base of the frequencies: pair i of n pairs rotates by ``base ** (-i / n)`` radians per position."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.config.dim % 2:
            raise ValueError(f"rotary needs an even head width, not {self.config.dim}")
        if not context.connected & {"x", "tokens"}:
            raise ValueError("rotary needs its input 'x' or 'tokens', which provides the length")

    def forward(
        self,
        x: Float[Tensor, "b l d"] | None = None,
        places: Int[Tensor, "l"] | None = None,
        tokens: Int[Tensor, "b l"] | None = None,
    ) -> Float[Tensor, "2 l dim"]:
        """Compute the cosines and sines of the rotary angles.

        Args:
            x: Values of the sequence, [b, l, d], which provide the length and device.
            places: Position index of each element of the sequence, [l]; 0, 1, 2, ... if not connected.
            tokens: Token ids, int64 [b, l], which provide the length and device if ``x`` is not connected.

        Returns:
            Cosines (index 0) and sines (index 1), [2, l, dim], float32.
        """
        dim = self.config.dim
        given = tokens if x is None else x
        if given is None:
            raise ValueError("rotary needs its input 'x' or 'tokens'")
        where = torch.arange(given.shape[1], device=given.device) if places is None else places
        frequency = 1.0 / self.config.base ** (torch.arange(0, dim, 2, device=given.device, dtype=torch.float32) / dim)
        angle = torch.outer(where.to(torch.float32), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        return torch.stack([angle.cos(), angle.sin()])


class LearnedPositions(Component, kind="position"):
    """Learned position embedding, added to the input.

    Raises:
        ValueError: In ``forward``, the sequence is longer than ``max_length``.
    """

    class Config(ComponentConfig):
        max_length: SizeField
        """Maximum length of a sequence."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.embed = nn.Embedding(self.config.max_length, self.axis("d"))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        if x.shape[1] > self.config.max_length:
            raise ValueError(f"sequence of {x.shape[1]} is longer than max_length = {self.config.max_length}")
        return x + self.embed.weight[: x.shape[1]]


class SinusoidalPositions(Component, kind="position"):
    """Fixed sinusoidal position encoding, added to the input (arXiv 1706.03762, section 3.5)."""

    class Config(ComponentConfig):
        base: float = 10000.0
        """Base of the frequencies: frequency i of n is ``base ** (-i / n)`` radians per position."""

    config: Config

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        width = x.shape[-1]
        half = (width + 1) // 2
        frequency = self.config.base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), frequency)
        return x + torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width].to(x.dtype)
