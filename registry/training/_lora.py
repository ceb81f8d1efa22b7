"""Parametrization of a matrix as a frozen one plus a product of two thin ones."""

import math

import torch
from torch import Tensor, nn

from sedd_graph.diffusion.numerics import full_precision


class LowRank(nn.Module):
    """W -> W + scale B A.

    Args:
        weight: The matrix W, [out, in].
        rank: Number of rows of A, [rank, in], and of columns of B, [out, rank].
        scale: Factor of the product.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        out, width = weight.shape
        self.a = nn.Parameter(weight.new_empty(rank, width))
        self.b = nn.Parameter(weight.new_zeros(out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        # in full precision, as when it is merged: autocast then rounds the sum
        with full_precision(weight):
            return torch.addmm(weight, self.b.to(weight.dtype), self.a.to(weight.dtype), alpha=self.scale)
