"""Numerical helpers of kernels, objectives and samplers: accurate logarithms at any noise, indexing, autocast."""

import contextlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

__all__ = ["FLOOR", "autocast_now", "full_precision", "log1mexp", "log_expm1", "take", "tiny"]

FLOOR = -1e6
"""Finite substitute for log 0: the difference of two such values is 0, whereas that of two minus infinities is NaN."""


def log1mexp(sigma: Tensor) -> Tensor:
    """Return ``log(1 - exp(-sigma))`` for sigma > 0, accurate in float32 both near 0 and at large sigma.

    With total noise ``sigma``, this is the log-probability that noise has hit a token at least once. The result has the
    shape of ``sigma``.
    """
    small = sigma < math.log(2)
    near = torch.where(small, sigma, 0.5)
    far = torch.where(small, 1.0, sigma)
    return torch.where(small, torch.log(-torch.expm1(-near)), torch.log1p(-torch.exp(-far)))


def log_expm1(sigma: Tensor) -> Tensor:
    """Return ``log(exp(sigma) - 1)`` for sigma > 0, without overflow, with the shape of ``sigma``."""
    return sigma + log1mexp(sigma)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values[..., index]``, one entry of the last axis for each index.

    Args:
        values: [..., n].
        index: int64 [...].

    Returns:
        [...].
    """
    return values.gather(-1, index[..., None])[..., 0]


def tiny(x: Tensor) -> float:
    """Return the smallest positive normal number of the dtype of ``x``, a lower clamp for denominators and logs."""
    return float(torch.finfo(x.dtype).tiny)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that disables autocast on the device of ``x``."""
    # meta tensors have no autocast, and torch raises when asked
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_now(device: torch.device) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a function that makes context managers with the autocast that is on now, if any, for code that runs later."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext
    return partial(torch.autocast, kind, dtype=torch.get_autocast_dtype(kind))
