"""Attention on torch's scaled_dot_product_attention: bidirectional, but for what it is told not to look at.

Axes: b batch, l length, heads, r width of one head, k key/value pairs of (cosine, sine).
"""

from typing import Annotated, Literal

import pydantic
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.component.counter_rng import dropout


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn ``x`` [..., l, r] by ``angles`` [2, l, r] (cosines, sines), halves paired as in RoFormer's public code."""
    cos, sin = angles[..., : x.shape[-1] // 2].to(x.dtype)  # the other halves are the same
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(Component, kind="attention"):
    """Every token sees every token that ``attend`` and ``sees`` allow. Rotary where ``angles`` is connected.

    ``attend`` hides some positions of each row from all; ``sees[i, j]``, the same for every row, lets position i look at j
    (each must see one at least). Text that is written block by block puts what is remembered in front of the j.
    """

    class Config(ComponentConfig):
        heads: SizeField
        qk_norm: Literal["none", "rms"] = "none"
        """``rms``: queries and keys to unit root mean square before the product (arXiv 2302.05442), with learned scale."""
        dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
        """Probability of dropping an attention weight in training."""
        bias: Literal["none", "all"] = "none"

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        width = self.config.heads * self.axis("r")
        bias = self.config.bias == "all"
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        if self.config.qk_norm == "rms":
            self.q_scale = nn.Parameter(torch.ones(self.axis("r")))
            self.k_scale = nn.Parameter(torch.ones(self.axis("r")))

    def forward(
        self,
        x: Float[Tensor, "b l heads*r"],
        angles: Float[Tensor, "2 l r"] | None = None,
        attend: Bool[Tensor, "b l"] | None = None,
        sees: Bool[Tensor, "l l"] | None = None,
        key: Tensor | None = None,
    ) -> Float[Tensor, "b l heads*r"]:
        b, l, d = x.shape
        # chunks, not slices: their gradients are put side by side, where those of slices are padded and added
        q, k, v = (part.view(b, l, self.config.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.config.qk_norm == "rms":
            q = F.rms_norm(q, q.shape[-1:], self.q_scale.to(q.dtype))
            k = F.rms_norm(k, k.shape[-1:], self.k_scale.to(k.dtype))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        # A row with nothing to attend to (all padding) attends to all: its output is never used, and stays finite.
        mask = None if attend is None else (attend | ~attend.any(-1, keepdim=True))[:, None, None, :]
        if sees is not None:
            mask = sees if mask is None else mask & sees
        v = v.to(q.dtype)
        if self.memory is not None:
            k, v = self.memory(k, v)
        if key is not None and self.config.dropout:
            y = self._dropped(q, k, v, mask, key)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, l, d))
        return out

    def _dropped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor) -> Tensor:
        """Attention written out: the fused kernels draw their dropout from the global generator, so that it could be
        neither split over processes nor drawn again."""
        weights = (q @ k.transpose(-2, -1)).float() / q.shape[-1] ** 0.5
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        return dropout(weights.softmax(-1).to(v.dtype), self.config.dropout, key) @ v
