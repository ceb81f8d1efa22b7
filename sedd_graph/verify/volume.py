"""Log-determinants of a function's Jacobian that do not use the derivation: the whole Jacobian, or an estimate of it.

Axes: n elements of one row, k probes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Estimate", "difference", "estimated_log_det", "jacobian", "pullback"]

Rows = Callable[[Tensor], Tensor]
"""Function from rows [k, n] to rows [k, n], applied to each row independently."""

PROBES, STEPS, EARLIER = 16, 24, 6
"""Probe vectors of an estimate, Lanczos steps of each, and how many steps before the last its convergence is measured."""


class Estimate(NamedTuple):
    """Estimate of a log-determinant, nats.

    Attributes:
        value: The estimate.
        error: Six standard errors of the mean over probes, plus twice the change of the last Lanczos steps.
    """

    value: float
    error: float


def pullback(function: Rows, x: Tensor, u: Tensor) -> Tensor:
    """Return J^T u of each row, [k, m], for a function from [k, m] to [k, n].

    Args:
        function: The function, applied to each row independently.
        x: Points, [k, m].
        u: Vectors, [k, n].
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaf = x.detach().requires_grad_()
        out = function(leaf)
        if not out.requires_grad:
            return torch.zeros_like(x)
        found: Tensor = torch.autograd.grad(out, leaf, u, materialize_grads=True)[0]
        return found


@torch.no_grad()
def difference(function: Rows, x: Tensor, v: Tensor) -> Tensor:
    """Return J v of each row by central differences, [k, n], with a relative error of about the machine epsilon^(2/3).

    Args:
        function: The function, applied to each row independently.
        x: Points, [k, m].
        v: Vectors, [k, m].
    """
    size = x.norm(dim=1, keepdim=True) / math.sqrt(x.shape[1])
    step = (
        torch.finfo(x.dtype).eps ** (1 / 3)
        * (1 + size)
        * math.sqrt(x.shape[1])
        / v.norm(dim=1, keepdim=True).clamp(min=1e-300)
    )
    found: Tensor = (function(x + step * v) - function(x - step * v)) / (2 * step)
    return found


def jacobian(function: Rows, x: Tensor) -> Tensor:
    """Return the Jacobian of a function of one row, float64 [n, n], computed with a single backward pass.

    Row i of the Jacobian is the gradient of output element i in the i-th of n equal copies of the row.

    Args:
        function: The function, applied to each row independently.
        x: The row, [n].
    """
    rows = x.expand(len(x), -1)
    return pullback(function, rows, torch.eye(len(x), dtype=x.dtype)).double()


@torch.no_grad()
def estimated_log_det(function: Rows, x: Tensor, seed: int = 0) -> Estimate:
    """Estimate log |det J| of a function of one row by stochastic Lanczos quadrature.

    It is half the trace of log(J^T J), estimated with random signs (Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl.
    38(4), algorithm 1). A multiple of an orthogonal map takes one step and has no error.

    Args:
        function: The function, applied to each row independently.
        x: The row, float64 [n].
        seed: Seed of the probe vectors.
    """
    n, steps = len(x), min(len(x), STEPS)
    generator = torch.Generator().manual_seed(seed)
    points = x.expand(PROBES, -1)
    now = (2 * torch.randint(0, 2, (PROBES, n), generator=generator) - 1).double() / math.sqrt(n)
    basis, alphas, betas = [now], [], []
    for _ in range(steps):
        moved = pullback(function, points, difference(function, points, now).to(x.dtype)).double()
        alphas.append((moved * now).sum(1))
        for _ in range(2):  # full orthogonalisation, twice
            for other in basis:
                moved = moved - (moved * other).sum(1, keepdim=True) * other
        beta = moved.norm(dim=1)
        ended = beta <= 1e-7 * alphas[0].abs()
        betas.append(torch.where(ended, 0.0, beta))
        now = torch.where(ended[:, None], 0.0, moved / beta.clamp(min=1e-300)[:, None])
        if bool(ended.all()):
            break
        basis.append(now)
    last = _quadrature(alphas, betas, n)
    earlier = _quadrature(alphas[:-EARLIER], betas[:-EARLIER], n) if len(alphas) == steps < n else last
    spread = float(last.std()) / math.sqrt(PROBES)
    return Estimate(float(last.mean()), 6 * spread + 2 * float((last - earlier).mean().abs()) + 1e-6 * n)


def _quadrature(alphas: list[Tensor], betas: list[Tensor], n: int) -> Tensor:
    """Return n / 2 times the Gauss quadrature of the logarithm, for each probe, [k]."""
    matrix = torch.diag_embed(torch.stack(alphas, 1))
    if len(alphas) > 1:
        side = torch.stack(betas[: len(alphas) - 1], 1)
        matrix = matrix + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    values, vectors = torch.linalg.eigh(matrix)
    weights = vectors[:, 0].square()
    found: Tensor = n / 2 * (weights * values.clamp(min=1e-300).log()).sum(1)
    return found
