"""Two components of our own: attention within a window, and a schedule that hits tokens early."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.plugin import Component, ComponentConfig, Context, Schedule, SizeField


class WindowAttention(Component, kind="attention"):
    """Every token sees the ``window`` tokens on either side of it."""

    class Config(ComponentConfig):
        heads: SizeField
        window: SizeField = 16

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.config.heads * self.axis("r")
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b l heads*r"]) -> Float[Tensor, "b l heads*r"]:
        b, l, d = x.shape
        q, k, v = self.qkv(x).view(b, l, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        place = torch.arange(l, device=x.device)
        near = (place[:, None] - place).abs() <= self.config.window
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return self.out(y.transpose(1, 2).reshape(b, l, d))


class SquareRoot(Schedule, kind="schedule"):
    """alpha = 1 - (1 - eps) sqrt(t)."""

    class Config(ComponentConfig):
        eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.config.eps) * t.sqrt())

    def dsigma(self, t: Tensor) -> Tensor:
        left = 1 - self.config.eps
        return left / (2 * t.sqrt() * (1 - left * t.sqrt()))
