"""Forms that stay exact in float32 near sigma = 0 and at large sigma."""

import contextlib
import math

import torch
from torch import Tensor

__all__ = ["FLOOR", "full_precision", "log1mexp", "log_expm1"]

FLOOR = -1e6
"""Stands for log 0 where minus infinity would turn a difference into NaN."""


def log1mexp(sigma: Tensor) -> Tensor:
    """``log(1 - exp(-sigma))`` for sigma > 0: the log chance that a token has been hit."""
    small = sigma < math.log(2)
    near = torch.where(small, sigma, 0.5)
    far = torch.where(small, 1.0, sigma)
    return torch.where(small, torch.log(-torch.expm1(-near)), torch.log1p(-torch.exp(-far)))


def log_expm1(sigma: Tensor) -> Tensor:
    """``log(exp(sigma) - 1)`` for sigma > 0, without overflow."""
    return sigma + log1mexp(sigma)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast on the device of ``x``. The meta device, where only shapes are run, has none and refuses the question."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
