"""Settings of sampling runs: the network, the conditions on rows, and the Config that all samplers share.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Protocol

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.conditions.conditions import Conditions
from sedd_graph.diffusion.conditions.constraint import Matching
from sedd_graph.diffusion.draws import Draws
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel

__all__ = ["ROUNDING", "T_MIN", "Denoise", "OnStep", "SamplerConfig", "WalkSettings"]


class Denoise(Protocol):
    """Type of the functions ``denoise(x, t, rows, at=None)`` that evaluate the network on some rows of the batch.

    Args:
        x: The r rows to evaluate, int64 [r, l].
        t: Their times, [r].
        rows: Their indices in the batch, int64 [r].
        at: Positions to evaluate, int64 [r, k]; None: all.

    Returns:
        ``log_score`` or ``log_x0`` by name, float32 [r, l, n], or [r, k, n] if ``at`` is given.
    """

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor, at: Tensor | None = None, /) -> Mapping[str, Tensor]: ...


OnStep = Callable[[int, Tensor], None]
"""Type of the callbacks ``on_step(index, rows)`` of a sampling run.

They are called with 0 and the initial rows, int64 [b, l], and after each step with the step's index, from 1, and the
rows.
"""

ROUNDING = 1e-4
"""Tolerance for probabilities: values outside [0, 1] by more than this are counted in ``clamped`` of the sampler."""

T_MIN = 1e-5
"""Time at which the steps end and the remaining noise is removed."""


class SamplerConfig(Conditions):
    """Config of every sampler: temperature and nucleus truncation of the new token at a position that changes.

    These keys do not affect which positions change.
    """

    temperature: Annotated[float, pydantic.Field(ge=0, le=100)] = 1.0
    """Temperature of sampling a new token, from 0 to 100.

    Probabilities are raised to the power 1/temperature. 0: the most likely token.
    """
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    """Nucleus sampling, above 0 up to 1: tokens outside the nucleus are not sampled.

    The nucleus is the smallest set of most likely tokens whose probabilities sum to at least this value.
    """

    @property
    def spread(self) -> bool:
        """Whether the positions that change in a step are spread evenly over each row, in place of independent."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """Settings of a sampling run: the process to reverse, and the conditions on the rows.

    Attributes:
        free: bool [b, l], positions that may change; the others are given.
        kernel: The forward process of one token.
        schedule: Total noise as a function of time.
        generator: Random number generator on the device of the rows.
        allowed: bool [n], [l, n] or [b, l, n], data tokens that may be sampled; None: all.
        unconditioned: bool [n], data tokens that would be allowed without the conditions. If given, importance weights
            of the rows are computed, which correct for the conditions; None: no weights. For a kernel with carry-over
            unmasking.
        matching: Constraint that whole rows match a regular expression, for a kernel with carry-over unmasking; None:
            no constraint.
        draws: Random numbers of the run; None: from ``generator``.
        timeless: True if the network's outputs do not depend on time.
        on_step: Callback after each step; None: no callback.
        first_step: Number of steps that were taken before the run, which continues another one.
        on_confidence: Callback before ``on_step`` with the step's index and the confidences of the rows' tokens, float32 [b, l]
            (:class:`~sedd_graph.diffusion.tokens.confidence.Confidences`); None: they are not computed.
    """

    free: Tensor
    kernel: Kernel
    schedule: Schedule
    generator: torch.Generator
    allowed: Tensor | None = None
    unconditioned: Tensor | None = None
    matching: Matching | None = None
    draws: Draws | None = None
    timeless: bool = False
    on_step: OnStep | None = None
    first_step: int = 0
    on_confidence: OnStep | None = None
