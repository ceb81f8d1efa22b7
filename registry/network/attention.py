"""Multi-head attention by torch's fused kernels, bidirectional except where a mask forbids it.

Axes: b batch, l length, heads, r width of one head.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sedd_graph.component.base import Component, ComponentConfig, Context
from sedd_graph.component.contract import SizeField
from sedd_graph.component.counter_rng import dropout

from ._masked import masked_attention
from ._shared import Bias, DropoutRate


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels, channel i with channel i + r/2 (RoFormer's rotation, arXiv 2104.09864, equation 34).

    Args:
        x: Queries or keys, [..., l, r].
        angles: Cosines (index 0) and sines (index 1), [2, l, r]; along r, the second half repeats the first.

    Returns:
        The rotated values, [..., l, r].
    """
    cos, sin = angles[..., : x.shape[-1] // 2].to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attendable(attend: Tensor | None) -> Tensor | None:
    """Return the mask ``attend`` [b, l] with all-false rows set to true, so that their softmax stays finite.

    None if it hides nothing: no mask is given, or each row of it is one value, expanded over the positions (a stride of
    0; see ``nothing_hidden`` in :mod:`sedd_graph.diffusion.batch`). This is known without reading the mask.
    """
    if attend is None or attend.stride(-1) == 0:
        return None
    return attend | ~attend.any(-1, keepdim=True)


class Attention(Component, kind="attention"):
    """Multi-head self-attention (arXiv 1706.03762), with rotary position embedding if ``angles`` is connected.

    With ``kv_heads``, groups of query heads share the keys and values of one head (grouped-query attention, arXiv
    2305.13245). The width of a head is the width of ``x`` divided by ``heads``. With a KV cache (block diffusion), the cached keys
    and values of finished positions precede those of ``x``, and the attention mask ``sees`` has one column for each
    cached position, followed by one for each position of ``x``.
    """

    class Config(ComponentConfig):
        heads: SizeField
        """Number of heads; must divide the width of ``x``."""
        kv_heads: SizeField | None = None
        """Number of heads of keys and values; must divide ``heads``. By default ``heads``."""
        qk_norm: Literal["none", "rms"] = "none"
        """Normalisation of queries and keys: ``rms`` scales each to unit root mean square, times a learned scale (arXiv
        2302.05442); ``none``."""
        dropout: DropoutRate = 0.0
        """Probability that an attention weight is dropped in training, in [0, 1)."""
        bias: Bias = "none"
        """Biases of the input and output projections: ``all`` or ``none``."""

    config: Config

    def __init__(self, config: ComponentConfig, context: Context) -> None:
        super().__init__(config, context)
        heads, kv_heads = self.config.heads, self.config.kv_heads or self.config.heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads = {kv_heads} does not divide heads = {heads}")
        width = heads * self.axis("r")
        self.widths = [width, kv_heads * self.axis("r"), kv_heads * self.axis("r")]
        bias = self.config.bias == "all"
        self.qkv = nn.Linear(width, sum(self.widths), bias=bias)
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
        """Attend from each position to every position that the masks ``attend`` and ``sees`` allow.

        Args:
            x: Input, [b, l, heads * r].
            angles: Cosines and sines from a ``rotary`` node, applied to queries and keys, [2, l, r].
            attend: False at positions that no position of the same row may attend to, [b, l]. In a row that is entirely
                false, every position may be attended to, so that the output stays finite.
            sees: True at [i, j] if position i may attend to position j, in every row, [l, l]; true for at least one j
                per i.
            key: Random seed of each row's dropout, int32 [b]; None disables dropout.

        Returns:
            The output, [b, l, heads * r].
        """
        b, l, d = x.shape
        # chunks rather than slices: autograd concatenates gradients of chunks, and pads and adds those of slices
        parts = self.qkv(x).chunk(3, -1) if self.config.kv_heads is None else self.qkv(x).split(self.widths, -1)
        q, k, v = (part.view(b, l, -1, d // self.config.heads).transpose(1, 2) for part in parts)
        if self.config.qk_norm == "rms":
            q = F.rms_norm(q, q.shape[-1:], self.q_scale.to(q.dtype))
            k = F.rms_norm(k, k.shape[-1:], self.k_scale.to(k.dtype))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        mask = attendable(attend)
        mask = None if mask is None else mask[:, None, None, :]
        v = v.to(q.dtype)
        if self.kv_cache is not None:
            k, v = self.kv_cache(k, v)
        if self.config.kv_heads is not None:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if key is not None and self.config.dropout:
            y = self._with_dropout(q, k, v, [m for m in (mask, sees) if m is not None], key)
        else:
            y = masked_attention(q, k, v, mask, sees)
        out: Tensor = self.out(y.transpose(1, 2).reshape(b, l, d))
        return out

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], key: Tensor) -> Tensor:
        """Return attention with dropout that is seeded per row by ``key``.

        Fused kernels use torch's global generator, with which dropout can neither be split over processes nor be
        replayed in the backward pass.
        """
        weights = (q @ k.transpose(-2, -1)).float() / q.shape[-1] ** 0.5
        for mask in masks:
            weights = weights.masked_fill(~mask, -torch.inf)
        return dropout(weights.softmax(-1).to(v.dtype), self.config.dropout, key) @ v
