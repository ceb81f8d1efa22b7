"""Numerics that kernels, objectives and samplers share: precise logarithms at any noise level, indexing, autocast."""

import contextlib
import math

import torch
from torch import Tensor

__all__ = ["FLOOR", "full_precision", "log1mexp", "log_expm1", "take", "tiny"]

FLOOR = -1e6
"""Finite stand-in for log 0: a difference of two of them is 0, where minus infinity gives NaN."""


def log1mexp(sigma: Tensor) -> Tensor:
    """Return ``log(1 - exp(-sigma))`` for sigma > 0, precise in float32 near 0 and at large sigma.

    It is the log-probability that a token has been hit by total noise ``sigma``.
    """
    small = sigma < math.log(2)
    near = torch.where(small, sigma, 0.5)
    far = torch.where(small, 1.0, sigma)
    return torch.where(small, torch.log(-torch.expm1(-near)), torch.log1p(-torch.exp(-far)))


def log_expm1(sigma: Tensor) -> Tensor:
    """Return ``log(exp(sigma) - 1)`` for sigma > 0, without overflow."""
    return sigma + log1mexp(sigma)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return the entry of ``values`` [..., n] at ``index`` int64 [...], shape [...]."""
    return values.gather(-1, index[..., None])[..., 0]


def tiny(x: Tensor) -> float:
    """Return the smallest positive normal number of the dtype of ``x``, the lower clamp of a denominator or logarithm."""
    return float(torch.finfo(x.dtype).tiny)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context without autocast on the device of ``x``."""
    # meta tensors have no autocast, and torch raises when asked
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
