"""Where a token stands: rotary angles for attention, and learned or sinusoidal vectors to add to the embeddings."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField

MAX_POSITION_ENTRIES = 2**28


class Rotary(Component, kind="position"):
    """Rotary angles (RoFormer, arXiv 2104.09864): cosines and sines that attention turns its queries and keys by.

    Computed once and shared by every attention that is connected to them. ``dim`` is the width of one head. ``places`` says
    where each position stands, where that is not the order they come in.
    """

    class Config(ComponentConfig):
        dim: SizeField
        base: float = 10000.0

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        if self.config.dim % 2:
            raise ValueError(f"rotary needs an even head width, not {self.config.dim}")

    def forward(self, x: Float[Tensor, "b l d"], places: Int[Tensor, "l"] | None = None) -> Float[Tensor, "2 l dim"]:
        dim = self.config.dim
        where = torch.arange(x.shape[1], device=x.device) if places is None else places
        frequency = 1.0 / self.config.base ** (torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
        angle = torch.outer(where.to(torch.float32), frequency)
        angle = torch.cat([angle, angle], dim=-1)
        return torch.stack([angle.cos(), angle.sin()])


class LearnedPositions(Component, kind="position"):
    """Adds a learned vector for each of ``max_length`` positions."""

    class Config(ComponentConfig):
        max_length: SizeField

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        self.embed = nn.Embedding(self.config.max_length, self.axis("d"))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        if x.shape[1] > self.config.max_length:
            raise ValueError(f"sequence of {x.shape[1]} is longer than max_length = {self.config.max_length}")
        return x + self.embed.weight[: x.shape[1]]


class SinusoidalPositions(Component, kind="position"):
    """Adds the fixed sines and cosines of Attention Is All You Need (arXiv 1706.03762, section 3.5)."""

    class Config(ComponentConfig):
        base: float = 10000.0

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        width = x.shape[-1]
        half = (width + 1) // 2
        frequency = self.config.base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), frequency)
        return x + torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :width].to(x.dtype)
