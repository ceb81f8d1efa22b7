"""Scaled dot-product attention under masks: torch's, or FlexAttention where a mask hides whole blocks on a GPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.component.exported import exported_as
from sedd_graph.diffusion.visibility import blocks_of

DTYPES = (torch.bfloat16, torch.float16)
"""Precisions in which FlexAttention is used; in float32 its kernels are no faster."""
WIDTHS = range(16, 257)
"""Widths of a head for which FlexAttention has kernels."""


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees: Tensor | None) -> Tensor:
    """Return the result of :func:`masked_attention`, computed by ``scaled_dot_product_attention``."""
    if sees is not None:
        mask = sees if mask is None else mask & sees
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@exported_as(dense_attention)
def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees: Tensor | None) -> Tensor:
    """Return scaled dot-product attention under two masks.

    Args:
        q: Queries, [b, heads, q, r].
        k: Keys, [b, heads, k, r].
        v: Values, [b, heads, k, r].
        mask: True at keys that may be attended to, bool [b, 1, 1, k]; None: all.
        sees: True where a query may attend to a key, bool [q, k]; None: everywhere. If it has a table of blocks
            (:func:`~sedd_graph.diffusion.visibility.with_blocks`), compiled code skips those that are hidden.

    Returns:
        [b, heads, q, r].
    """
    blocks = blocks_of(sees) if mask is None else None
    if blocks is None or q.dtype not in DTYPES or q.shape[-1] not in WIDTHS:
        return dense_attention(q, k, v, mask, sees)
    from torch.nn.attention.flex_attention import flex_attention

    found: Tensor = flex_attention(q, k, v, block_mask=blocks)
    return found
