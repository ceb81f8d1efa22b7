"""Config types and numerical helpers shared by the components of several folders."""

from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.diffusion.numerics import full_precision

Bias = Literal["none", "all"]
Positive = Annotated[float, pydantic.Field(gt=0)]
DropoutRate = Annotated[float, pydantic.Field(ge=0, lt=1)]


def wide(x: Tensor) -> Tensor:
    """Return ``x`` converted to float32, or unchanged if its dtype is float64."""
    return x if x.dtype == torch.float64 else x.float()


def full_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, computed in float32 (float64 for a float64 ``x``) even under autocast.

    Args:
        x: Input, [..., d].
        weight: Weight, [width, d].
        bias: Bias, [width], or None.

    Returns:
        The output, [..., width], float32 or float64.
    """
    with full_precision(x):
        rows = wide(x)
        return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
