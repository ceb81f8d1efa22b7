"""Inversion of ``y = x + g(x)`` for a contraction ``g`` by fixed-point iteration, and its log-determinant.

This module does not depend on graphs or components. A sequence is one row of the batch. Axes: b batch, n elements of
one sequence. Sources: i-ResNet (arXiv 1811.00995), Residual Flows (arXiv 1906.02735), Anderson acceleration (Walker and
Ni 2011).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sedd_graph.diffusion.batch import part_of
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.errors import SeddGraphError, UserError

__all__ = ["Iteration", "LogDet", "Map", "NotConverged", "Solution", "log_det", "solve"]

Map = Callable[[Tensor], Tensor]
"""A function from a tensor [b, ...] to a tensor of the same shape, which maps each sequence independently."""


class NotConverged(SeddGraphError):
    """Exception: the fixed-point iteration did not reach its tolerance.

    Usually the Lipschitz constant of the function is larger than the declared one.
    """


class Solution(NamedTuple):
    """Solution x of x = y - g(x).

    Attributes:
        x: The solution, [b, ...].
        error: Upper bound on the error of x relative to max(||x||, ||y||), the largest over the sequences of the batch.
        evaluations: Number of evaluations of g on the whole batch.
    """

    x: Tensor
    error: float
    evaluations: int


class LogDet(NamedTuple):
    """Log-determinant log |det (I + dg/dx)| of each sequence, in nats.

    Attributes:
        value: Exact value or unbiased estimate, float64 [b].
        variance: Estimated variance of ``value``, nats squared, float64 [b]; zero if ``value`` is exact.
    """

    value: Tensor
    variance: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """Settings of a fixed-point iteration for x = y - g(x).

    Attributes:
        lipschitz: Lipschitz constant c of g, in [0, 1), in the Euclidean norm of a sequence.
        tolerance: Error of x, relative to max(||x||, ||y||), at which the iteration stops. None: 8 eps / (1 - c)^1.5,
            with eps the machine epsilon of the dtype; the rounding errors of all evaluations accumulate to eps / (1 -
            c).
        max_evaluations: Number of evaluations of g after which the iteration gives up. None: twice the number after
            which the plain (Picard) iteration is guaranteed to converge, plus 8.
        history: Number of previous steps that Anderson acceleration combines; 0 for the plain (Picard) iteration.

    Raises:
        UserError: The Lipschitz constant is outside [0, 1).
    """

    lipschitz: float
    tolerance: float | None = None
    max_evaluations: int | None = None
    history: int = 5

    def __post_init__(self) -> None:
        _check_constant(self.lipschitz)

    def limits(self, dtype: torch.dtype) -> tuple[float, int]:
        """Return the tolerance and the largest number of evaluations for ``dtype``, with None replaced by the defaults.

        Raises:
            UserError: Rounding in ``dtype`` prevents the iteration from reaching the tolerance.
        """
        c = self.lipschitz
        least = torch.finfo(dtype).eps / (1 - c)
        tolerance = 8 * least / math.sqrt(1 - c) if self.tolerance is None else self.tolerance
        if tolerance < least:
            raise UserError(
                f"fixed point: {dtype} cannot reach a tolerance of {tolerance:.1e} at a Lipschitz constant of {c:g}; "
                f"use {2 * least:.1e} or more, or work in float64"
            )
        if self.max_evaluations is not None:
            return tolerance, self.max_evaluations
        # ||z_k - z_(k-1)|| <= c^(k-1) ||g(y)||, which is at most 4 times the larger of ||x|| and ||y||. Twice as many,
        # for rejected accelerated steps.
        plain = math.log(tolerance * (1 - c) / 8) / math.log(c) if c > 0 else 0
        return tolerance, 8 + 2 * math.ceil(plain)


def _check_constant(lipschitz: float) -> None:
    if not 0 <= lipschitz < 1:
        raise UserError(f"fixed point: a contraction has a Lipschitz constant from 0 to below 1, not {lipschitz:g}")


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sequence, float64 [b]: in float32 the squares of small gradients underflow."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)
    return norm


@torch.no_grad()
def solve(g: Map, y: Tensor, iteration: Iteration) -> Solution:
    """Solve x = y - g(x) for each sequence by safeguarded Anderson acceleration, without gradients.

    An accelerated step is accepted if its residual is at most the Lipschitz constant times the previous residual, a
    decrease that a plain (Picard) step guarantees. Otherwise the plain step is taken, so that the worst case is twice
    the evaluations of the plain iteration. A sequence has converged when the error bound ||z_new - z|| / (1 -
    lipschitz) is at most the tolerance times max(||z_new||, ||y||), where z is the iterate that is returned and z_new the
    plain step from it.

    The declared Lipschitz constant is not trusted: two successive iterates u and v give the lower bound
    ``||g(u) - g(v)|| / ||u - v||``, less rounding, on the true one. The error bound uses the largest of the declared
    constant and these bounds. If a lower bound reaches 1, g is no contraction, and :class:`NotConverged` is raised.

    Args:
        g: The contraction.
        y: Right-hand side, [b, ...].
        iteration: Lipschitz constant of g, tolerance and limits.

    Raises:
        UserError: The dtype of ``y`` cannot reach the tolerance.
        NotConverged: The tolerance is not reached within the largest number of evaluations, an iterate is not finite, or
            the map is shown to be no contraction.
    """
    tolerance, limit = iteration.limits(y.dtype)
    flat, against = y.flatten(1), _norm(y)
    z = image = step = point = before = flat
    value_before: Tensor | None = None
    size = torch.full_like(against, math.inf)
    constant = torch.full_like(against, iteration.lipschitz)
    slack = 64 * torch.finfo(y.dtype).eps
    tried = done = torch.zeros_like(against, dtype=torch.bool)
    history: list[tuple[Tensor, Tensor]] = []
    error = math.inf
    for evaluation in range(1, limit + 1):
        value = g(z.view_as(y)).flatten(1)
        plain = flat - value
        moved = plain - z
        length = _norm(moved)
        if value_before is not None:
            # what rounding cannot explain of the distance between two images, relative to that of their points
            noise = slack * torch.maximum(torch.maximum(_norm(plain), _norm(z)), against)
            ratio = (_norm(value - value_before) - noise) / _norm(z - before).clamp(min=1e-300)
            constant = torch.maximum(constant, ratio.nan_to_num(0.0, posinf=math.inf))
            if bool((constant >= 1).any()):
                raise NotConverged(
                    f"fixed point: the map's real constant is larger than {iteration.lipschitz:g}: at evaluation {evaluation} two "
                    f"points move apart {float(constant.max()):.4g}-fold, so that it is no contraction, and more than one solution "
                    "is possible"
                )
        before, value_before = z, value
        accepted = ~done & (~tried | (length <= iteration.lipschitz * size))
        # A rejected step is discarded: its sequence resumes with the plain step from the last accepted point, or stays
        # where it is if it is done.
        point = torch.where(accepted[:, None], z, point)
        image = torch.where(accepted[:, None], plain, image)
        step = torch.where(accepted[:, None], moved, step)
        size = torch.where(accepted, length, size)
        bound, scale = size / (1 - constant), torch.maximum(_norm(image), against)
        error, done = _worst(bound, scale), bound <= tolerance * scale
        if not math.isfinite(error):
            raise NotConverged(f"fixed point: the map gives values that are not finite at evaluation {evaluation}")
        if error <= tolerance:
            return Solution(point.view_as(y), error, evaluation)
        z = image
        if iteration.history:
            history = [*history, (image, step)][-iteration.history - 1 :]
            faster = _anderson(history)
            tried = accepted & faster.isfinite().all(1)
            z = torch.where(tried[:, None], faster, image)
    raise NotConverged(
        f"fixed point: after {limit} evaluations the relative error is bounded by {error:.1e}, not {tolerance:.1e}. Unless "
        f"max_evaluations was set too low, the map's real constant is larger than {iteration.lipschitz:g}, or it changes "
        "between evaluations"
    )


def _worst(bound: Tensor, scale: Tensor) -> float:
    return float((bound / scale.clamp(min=torch.finfo(scale.dtype).tiny)).max()) if bound.numel() else 0.0


def _anderson(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the accelerated next point of each sequence, [b, n], from pairs of (image, step) [b, n], the newest last.

    It is the affine combination of the images whose combined step is smallest. Pairs that repeat the one before (a rejected
    step) have differences of zero, and do not contribute.
    """
    image, step = history[-1]
    if len(history) < 2:
        return image
    steps = torch.stack([s for _, s in history], dim=-1).double().diff(dim=-1)
    images = torch.stack([i for i, _ in history], dim=-1).diff(dim=-1)
    gram = steps.mT @ steps
    # Differences of steps become parallel near the solution: a small ridge keeps the system solvable.
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    eye = torch.eye(gram.shape[-1], device=gram.device)
    ridge = (1e-12 * trace + torch.finfo(torch.float64).tiny)[:, None, None] * eye
    weights: Tensor = torch.linalg.solve(gram + ridge, steps.mT @ step.double()[..., None])
    return image - (images @ weights.to(image.dtype)).squeeze(-1)


def log_det(
    g: Map,
    x: Tensor,
    *,
    lipschitz: float,
    exact_up_to: int = 128,
    probes: int = 4,
    certain_terms: int = 8,
    generator: torch.Generator | None = None,
    part: range | None = None,
    total: int | None = None,
) -> LogDet:
    """Return log |det d(x + g(x))/dx| of each sequence in nats, differentiable if gradients are enabled.

    A sequence of up to ``exact_up_to`` elements gets the exact value, from its full Jacobian (one backward pass per
    element). A longer one gets an unbiased estimate of the power series sum over k of (-1)^(k+1) tr(J^k) / k, with J =
    dg/dx (Residual Flows, equation 6). The gradient of the estimate is unbiased too.

    Args:
        g: The contraction.
        x: Points at which the determinant is evaluated, [b, ...].
        lipschitz: Lipschitz constant of ``g``.
        exact_up_to: Largest number of elements of a sequence for which the full Jacobian is computed.
        probes: Number of independent estimates that are averaged, at least 2.
        certain_terms: Number of terms of the series that are always computed; the rest are truncated at random.
        generator: Random generator of the probe vectors and truncations; None: torch's global one.
        part: Places of the sequences among ``total`` ones, of which each gets the same probe vectors however they are
            divided; None: all.
        total: Number of these sequences.

    Raises:
        UserError: The Lipschitz constant is outside [0, 1), or there are fewer than 2 probes.
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
        with full_precision(point):  # products of a backward pass have no autocast
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
    device = generator.device if generator else None

    def draw() -> tuple[float, Tensor]:
        u = float(torch.rand((), dtype=torch.float64, generator=generator, device=device))
        shape = (total or len(moved), *moved.shape[1:])
        signs = torch.randint(0, 2, shape, generator=generator, device=device or moved.device)
        signs = signs if part is None else part_of(signs, part)
        return u, (2 * signs - 1).to(moved.device, moved.dtype)

    values = torch.stack([_estimate(pulled, *draw(), chance, certain_terms) for _ in range(probes)])
    return LogDet(values.mean(0), values.detach().var(0) / probes)


def _estimate(pulled: Map, u: float, probe: Tensor, chance: float, certain_terms: int) -> Tensor:
    """Return one unbiased estimate, float64 [b], of the power series of the log-determinant.

    Traces are estimated with random signs ``probe`` (Hutchinson). ``u`` is uniform in [0, 1): after ``certain_terms`` each further term is computed with
    probability ``chance`` and divided by the probability that it is reached; with a chance of at least the Lipschitz
    constant the variance is finite. ``pulled`` maps v to J^T v of every sequence.
    """
    terms = certain_terms + int(math.log1p(-u) / math.log(chance))  # P(terms >= certain + j) = chance^j
    v, total = probe, torch.zeros(len(probe), dtype=torch.float64, device=probe.device)
    for k in range(1, terms + 1):
        v = pulled(v)
        trace = (v * probe).flatten(1).sum(1, dtype=total.dtype)
        total = total + trace * ((-1) ** (k + 1) / (k * chance ** max(0, k - certain_terms)))
    return total
