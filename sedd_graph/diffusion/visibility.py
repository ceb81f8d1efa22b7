"""Masks of which position attends to which, with the blocks in which they hide everything, for FlexAttention.

A mask bool [q, k] that all rows of a batch share, such as that of block diffusion, often hides whole blocks of positions.
On a GPU, compiled attention then computes the other blocks alone (FlexAttention, arXiv 2412.05496).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["blocks_of", "with_blocks"]

DEVICES = ("cuda",)
"""Kinds of devices with compiled kernels of FlexAttention, forward and backward."""
LEAST = 256
"""Least number of queries and of keys: two blocks of 128."""
_NAME = "visible_blocks"


def with_blocks(sees: Tensor) -> Tensor:
    """Return a mask with a table of the blocks of 128 x 128 in which it shows something, as an attribute of the tensor.

    The table is made at once, which takes longer than attention: make a mask once and keep it. Only on a GPU, and for masks
    of two blocks or more, is there a table; without it attention takes the mask as it is.

    Args:
        sees: True where a query (first axis) may attend to a key, bool [q, k]. It must not change afterwards.
    """
    if sees.device.type in DEVICES and min(sees.shape) >= LEAST:
        from torch.nn.attention.flex_attention import create_block_mask

        own = sees.detach()  # another object: the mask would otherwise refer to itself

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return own[query, key]

        setattr(sees, _NAME, create_block_mask(visible, None, None, len(sees), sees.shape[1], device=sees.device))
    return sees


def blocks_of(sees: Tensor | None) -> BlockMask | None:
    """Return the table of blocks of a mask from :func:`with_blocks`, for compiled code; None if there is none."""
    return getattr(sees, _NAME, None) if sees is not None and torch.compiler.is_compiling() else None
