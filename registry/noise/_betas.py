"""Sequences of betas: the noise of each step of a process in discrete time (D3PM, arXiv 2107.03006)."""

from typing import Annotated

import pydantic
import torch
from torch import Tensor

__all__ = ["MOST_STEPS", "StepCount", "linear_betas"]

MOST_STEPS = 10_000
"""Largest number of steps of a list of betas, and of a kernel in discrete time."""

StepCount = Annotated[int, pydantic.Field(ge=1, le=MOST_STEPS)]


def linear_betas(first: float, last: float, steps: int, *, end: bool) -> Tensor:
    """Return betas that are linear in the step.

    Args:
        first: The first beta.
        last: The last beta, or the one that would follow it if ``end`` is False.
        steps: Number of steps T.
        end: True for ``linspace(first, last, T)``, as in D3PM's code for images; False without the end point, as in its
            code for text.

    Returns:
        float64 [T].
    """
    share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1 if end else steps)
    return first + (last - first) * share
