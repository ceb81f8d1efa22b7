"""Config types and numerics that components of several themes share."""

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
    """Return ``x`` in float32, or unchanged where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def full_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32 (in float64 for a float64 ``x``), under autocast too.

    Args:
        x: Rows, [..., d].
        weight: [width, d].
        bias: [width], or None for none.

    Returns:
        [..., width].
    """
    with full_precision(x):
        rows = wide(x)
        return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
