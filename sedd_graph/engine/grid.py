"""Exact arithmetic: streams on a fixed grid, on which float32 adds and subtracts without rounding.

A multiple of 2^-bits below 2^(24 - bits) has a significand of at most 24 bits, and so has the sum of two of them while it
stays below that: float32 represents it exactly. The output of a branch is rounded to the grid once, equally in both
directions, so that a sum is inverted to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sedd_graph.errors import DivergedError

__all__ = ["Grid"]


class _Snap(torch.autograd.Function):
    """Rounding to a grid, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        return torch.round(x.float() * 2.0**bits) * 2.0**-bits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Grid of the multiples of 2^-``bits``, float32."""

    bits: int = 16

    @property
    def limit(self) -> float:
        """Magnitude below which the sum of two values is exact."""
        return 2.0 ** (23 - self.bits)

    def snap(self, x: Tensor) -> Tensor:
        """Round ``x`` to the grid; gradients pass unchanged."""
        snapped: Tensor = _Snap.apply(x, self.bits)
        return snapped

    def check_range(self, streams: Sequence[Tensor], where: str) -> None:
        """Raise :class:`DivergedError` where a stream has left the range in which sums are exact."""
        if streams[0].is_meta:  # shapes only
            return
        worst = torch.stack([x.detach().abs().max() for x in streams]).max()
        if not bool(worst < self.limit):
            raise DivergedError(
                f"{where}: a stream reached {float(worst):.3g}; with exact arithmetic on a grid of 2^-{self.bits} it must stay "
                f"below {self.limit:g}. Use 'arithmetic: float', or keep the streams smaller (a norm after the branches)"
            )
