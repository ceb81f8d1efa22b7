"""Undoing ``y = x + g(x)`` where ``g`` is a contraction: the iteration, its gradients, and the change of volume.

It knows nothing of graphs or components; a sequence is one row of the batch, whatever stands behind its first axis.
Sources: i-ResNet (arXiv 1811.00995), Residual Flows (arXiv 1906.02735), Anderson acceleration (Walker and Ni 2011),
implicit gradients (Deep Equilibrium Models, arXiv 1909.01377).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sedd_graph.errors import SeddGraphError, UserError

__all__ = ["LogDet", "NotConverged", "Solution", "fixed_point", "log_det", "solve"]

Map = Callable[[Tensor], Tensor]


class NotConverged(SeddGraphError):
    """The fixed-point iteration did not reach its tolerance: the map is no contraction by the constant it was given."""


class Solution(NamedTuple):
    """``x`` with x = y - g(x), the relative error bound that it was accepted at, and how often ``g`` was evaluated."""

    x: Tensor
    error: float
    evaluations: int


class LogDet(NamedTuple):
    """log |det (I + dg/dx)| in nats, [b], and the variance of that estimate, [b]: zero where it is exact."""

    value: Tensor
    variance: Tensor


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each sequence, float64 [b]: in float32 the squares of small gradients would vanish."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    return norm


@torch.no_grad()
def solve(
    g: Map,
    y: Tensor,
    *,
    lipschitz: float,
    tol: float | None = None,
    max_iter: int | None = None,
    memory: int = 5,
) -> Solution:
    """x = y - g(x) for each sequence of ``y`` [b, ...], ``g`` moving at most ``lipschitz`` < 1 times as far as its input.

    Anderson acceleration over ``memory`` steps, safeguarded: an accelerated step stands only if its residual is at most
    ``lipschitz`` times the last one, which a plain (Picard) step is sure of; else the plain step is taken. So at worst it
    costs twice the plain iteration, which ``memory=0`` gives. A sequence is done when the bound on its error,
    ||z_new - z|| / (1 - lipschitz), is at most ``tol`` times the larger of ||z_new|| and ||y||.

    ``tol`` is 8 roundings of the dtype over (1 - lipschitz)^1.5 where it is not given (each evaluation rounds anew, and the
    iteration adds that up), ``max_iter`` what the contraction guarantees. Raises :class:`UserError` for a constant of 1 or
    more and for a tolerance that the dtype cannot reach, and :class:`NotConverged` where it does not get there; it never
    returns less than was asked for.
    """
    _check_constant(lipschitz)
    least = torch.finfo(y.dtype).eps / (1 - lipschitz)
    tol = 8 * least / math.sqrt(1 - lipschitz) if tol is None else tol
    if tol < least:
        raise UserError(
            f"fixed point: {y.dtype} cannot reach a tolerance of {tol:.1e} at a Lipschitz constant of {lipschitz:g}; "
            f"ask for {2 * least:.1e} or more, or work in float64"
        )
    if max_iter is None:
        # ||z_k - z_(k-1)|| <= lipschitz^(k-1) ||g(y)||, and that is at most 4 times the larger of ||x|| and ||y||. Twice as
        # many, for accelerated steps that are refused.
        sure = math.log(tol * (1 - lipschitz) / 8) / math.log(lipschitz) if lipschitz > 0 else 0
        max_iter = 8 + 2 * math.ceil(sure)
    flat, against = y.flatten(1), _norm(y)
    z = image = step = flat
    size = torch.full_like(against, math.inf)
    tried = done = torch.zeros_like(against, dtype=torch.bool)
    history: list[tuple[Tensor, Tensor]] = []
    error = math.inf
    for evaluation in range(1, max_iter + 1):
        plain = flat - g(z.view_as(y)).flatten(1)
        moved = plain - z
        length = _norm(moved)
        stands = ~done & (~tried | (length <= lipschitz * size))
        # What does not stand leaves no trace: its sequence goes on with the plain step from the last point that did, or
        # stays where it is if it was done.
        image = torch.where(stands[:, None], plain, image)
        step = torch.where(stands[:, None], moved, step)
        size = torch.where(stands, length, size)
        bound, scale = size / (1 - lipschitz), torch.maximum(_norm(image), against)
        error, done = _worst(bound, scale), bound <= tol * scale
        if not math.isfinite(error):
            raise NotConverged(f"fixed point: the map gives values that are not finite at evaluation {evaluation}")
        if error <= tol:
            return Solution(image.view_as(y), error, evaluation)
        z = image
        if memory:
            history = [*history, (image, step)][-memory - 1 :]
            faster = _anderson(history)
            tried = stands & faster.isfinite().all(1)
            z = torch.where(tried[:, None], faster, image)
    raise NotConverged(
        f"fixed point: after {max_iter} evaluations the relative error is bounded by {error:.1e}, not {tol:.1e}. Unless "
        f"max_iter was set too low, the map's real constant is larger than {lipschitz:g}, or it changes between evaluations"
    )


def _check_constant(lipschitz: float) -> None:
    if not 0 <= lipschitz < 1:
        raise UserError(f"fixed point: a contraction has a Lipschitz constant from 0 to below 1, not {lipschitz:g}")


def _worst(bound: Tensor, scale: Tensor) -> float:
    return float((bound / scale.clamp(min=torch.finfo(scale.dtype).tiny)).max()) if bound.numel() else 0.0


def _anderson(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The accelerated next point of each sequence, [b, n], from pairs of (image, step) [b, n], the newest last.

    It is the affine combination of the images for which that of the steps is smallest. Pairs that repeat the one before
    (a step was refused) have differences of zero, and take no part.
    """
    image, step = history[-1]
    if len(history) < 2:
        return image
    steps = torch.stack([s for _, s in history], dim=-1).double().diff(dim=-1)
    images = torch.stack([i for i, _ in history], dim=-1).diff(dim=-1)
    gram = steps.mT @ steps
    # Differences of steps become parallel near the solution: a small ridge keeps the system solvable.
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    ridge = (1e-12 * trace + torch.finfo(torch.float64).tiny)[:, None, None] * torch.eye(
        gram.shape[-1], device=gram.device
    )
    weights: Tensor = torch.linalg.solve(gram + ridge, steps.mT @ step.double()[..., None])
    return image - (images @ weights.to(image.dtype)).squeeze(-1)


def fixed_point(
    g: Map,
    y: Tensor,
    *,
    lipschitz: float,
    tol: float | None = None,
    max_iter: int | None = None,
    memory: int = 5,
) -> Tensor:
    """x with x = y - g(x), as :func:`solve` finds it, with gradients to ``y`` and to whatever ``g`` depends on.

    The gradients are those of the implicit function: with v the gradient of x, u = v - (dg/dx)^T u is solved by the same
    iteration (the transposed Jacobian is the same contraction) to the same tolerance. No step of the iteration is kept: one
    further evaluation of ``g`` is, and one is made in the backward pass. Gradients of gradients are not defined. Raises as
    :func:`solve` does, in the backward pass too.
    """
    x = solve(g, y, lipschitz=lipschitz, tol=tol, max_iter=max_iter, memory=memory).x
    if not torch.is_grad_enabled():
        return x
    out = y - g(
        x
    )  # one more plain step carries the gradients to y and into g; the hook puts (I + dg/dx)^-T before them

    def implicit(v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            moved = g(point)

        def transposed(u: Tensor) -> Tensor:
            return torch.autograd.grad(moved, point, u, retain_graph=True, materialize_grads=True)[0]

        return solve(transposed, v, lipschitz=lipschitz, tol=tol, max_iter=max_iter, memory=memory).x

    if out.requires_grad:
        out.register_hook(implicit)
    return out


def log_det(
    g: Map,
    x: Tensor,
    *,
    lipschitz: float,
    exact_up_to: int = 128,
    probes: int = 4,
    sure: int = 8,
    generator: torch.Generator | None = None,
) -> LogDet:
    """log |det d(x + g(x))/dx| of each sequence of ``x`` [b, ...], in nats, with gradients where they are enabled.

    Sequences of at most ``exact_up_to`` numbers: exact, from the whole Jacobian (as many backward passes as numbers).
    Beyond: the power series sum over k of (-1)^(k+1) tr(J^k) / k without bias (Residual Flows, equation 6). Each of
    ``probes`` (2 or more) draws signs for the traces (Hutchinson) and a number of terms: ``sure`` of them always, then each
    next one with chance max(1/2, ``lipschitz``), divided by the chance that it is reached; with that chance the variance
    is finite for every contraction. The gradient of the estimate is an unbiased one of the exact value's.
    """
    _check_constant(lipschitz)
    if probes < 2:
        raise UserError(f"log-determinant: the variance of the estimate needs at least 2 probes, not {probes}")
    keep = torch.is_grad_enabled()
    # torch's fused attention has no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        point = x if keep and x.requires_grad else x.detach().requires_grad_()
        moved = g(point)

    def pulled(v: Tensor) -> Tensor:
        """J^T v of every sequence."""
        return torch.autograd.grad(moved, point, v, retain_graph=True, create_graph=keep, materialize_grads=True)[0]

    numbers = x[0].numel()
    zero = torch.zeros_like(_norm(x))
    if not moved.requires_grad or not numbers:
        return LogDet(zero, zero)
    if numbers <= exact_up_to:
        basis = torch.eye(numbers, dtype=moved.dtype, device=x.device).view(numbers, *x.shape[1:])
        jacobian = torch.stack([pulled(e.expand_as(moved)).flatten(1) for e in basis], dim=1)
        eye = torch.eye(numbers, dtype=zero.dtype, device=x.device)
        return LogDet(torch.linalg.slogdet(eye + jacobian.to(zero.dtype)).logabsdet, zero)
    chance = max(0.5, lipschitz)
    found = []
    for _ in range(probes):
        u = float(
            torch.rand((), dtype=torch.float64, generator=generator, device=generator.device if generator else None)
        )
        terms = sure + int(math.log1p(-u) / math.log(chance))  # P(terms >= sure + j) = chance^j
        signs = torch.randint(0, 2, x.shape, generator=generator, device=generator.device if generator else x.device)
        probe = (2 * signs - 1).to(x.device, moved.dtype)
        v, total = probe, zero
        for k in range(1, terms + 1):
            v = pulled(v)
            trace = (v * probe).flatten(1).sum(1, dtype=zero.dtype)
            total = total + trace * ((-1) ** (k + 1) / (k * chance ** max(0, k - sure)))
        found.append(total)
    values = torch.stack(found)
    return LogDet(values.mean(0), values.detach().var(0) / probes)
