"""Products exp(level G) x with sparse matrix exponentials by uniformization, as torch operators.

G is the symmetric generator of a Markov process. With p the largest rate of leaving a state and S = I + G / p,
exp(level G) is the sum over k of Poisson(k; level p) S^k. For level >= 0 all terms are positive, so small probabilities
have the same relative accuracy as large ones. Axes: r rows, n states, e edges.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["expm", "rows_of"]

TAIL = 1e-20
"""Poisson probability of the truncated tail of the sum."""
_CHUNK = 2**24
"""Number of entries of ``x`` in one sparse product."""
_FEW = 64
"""Largest n for which dense matrices may replace sparse products."""
_TABLES = 2**21
"""Approximate upper limit on the number of entries of all powers of a dense matrix."""
_PIECE = 2**20
"""Number of entries of dense matrices in memory at a time."""


def _table(start: Tensor, to: Tensor, rate: Tensor) -> Tensor:
    """Return the dense table [n, n] of compressed rows."""
    n = len(start) - 1
    table = rate.new_zeros(n, n)
    table[torch.repeat_interleave(torch.arange(n, device=to.device), start.diff()), to] = rate
    return table


def _expm_dense(x: Tensor, mean: Tensor, step: Tensor, most: float) -> Tensor:
    """Return the sum of Poisson(k; ``mean`` [r]) step^k applied to ``x`` [r, n] by dense tables, one per distinct mean.

    ``step`` is S [n, n] and ``most`` the largest absolute mean.
    """
    n, device = len(step), step.device
    k = torch.arange(1, 60 + round(8 * most), dtype=torch.float64, device=device)
    tail = TAIL * (math.exp(-2 * most) if bool((mean < 0).any()) else 1)
    terms = 1 + int((torch.special.gammainc(k, torch.full_like(k, most)) > tail).sum())
    powers = torch.eye(n, dtype=step.dtype, device=device)[None]
    while len(powers) < terms:
        powers = torch.cat([powers, powers @ (powers[-1] @ step)])
    powers = powers[:terms].reshape(terms, n * n)
    k = torch.arange(terms, dtype=torch.float64, device=device)
    sign, factorials = 1 - 2 * (k % 2), torch.lgamma(k + 1)
    one = bool((mean == mean[0]).all())  # as in a sampler
    means, of = (mean[:1], None) if one else torch.unique(mean, return_inverse=True)
    tables = torch.cat(
        [
            (
                torch.exp(torch.xlogy(k, part.abs()[:, None]) - part[:, None] - factorials)
                * torch.where(part[:, None] < 0, sign, 1.0)
                @ powers
            ).to(x.dtype)
            for part in means.split(max(1, _PIECE // terms))
        ]
    ).view(-1, n, n)
    if of is None:
        return x @ tables[0]
    parts = zip(x.split(max(1, _PIECE // n**2)), of.split(max(1, _PIECE // n**2)), strict=True)
    return torch.cat([(row[:, None] @ tables[which])[:, 0] for row, which in parts])


def rows_of(x: Tensor, start: Tensor, to: Tensor, rate: Tensor, states: int) -> Tensor:
    """Return dense rows of a sparse rate matrix, as one operator under ``torch.compile``.

    Args:
        x: Indices of the rows, int64 [r].
        start: Offsets of the compressed sparse rows, int64 [n + 1].
        to: Column of each entry, int64 [e].
        rate: Value of each entry, [e].
        states: Number of columns n.

    Returns:
        Rates between each ``x`` and each state, [r, n], in the dtype of ``rate``.
    """
    # operators of torch.library import torch._dynamo, which takes seconds, so that plain calls do without them
    return (_rows_operator if torch.compiler.is_compiling() else _rows_of)(x, start, to, rate, states)


def _rows_of(x: Tensor, start: Tensor, to: Tensor, rate: Tensor, states: int) -> Tensor:
    if states <= _FEW:
        return _table(start, to, rate)[x]
    count = start[x + 1] - start[x]
    row = torch.repeat_interleave(torch.arange(len(x), device=x.device), count)
    edge = torch.arange(len(row), device=x.device) - (count.cumsum(0) - count - start[x])[row]
    out = torch.zeros(len(x), states, dtype=rate.dtype, device=x.device)
    out[row, to[edge]] = rate[edge]
    return out


_rows_operator = torch.library.custom_op("sedd_graph::neighbours_rows", _rows_of, mutates_args=())


@_rows_operator.register_fake
def _(x: Tensor, start: Tensor, to: Tensor, rate: Tensor, states: int) -> Tensor:
    return rate.new_empty(len(x), states)


def expm(x: Tensor, level: Tensor, start: Tensor, to: Tensor, rate: Tensor, leave: Tensor) -> Tensor:
    """Multiply each row by a matrix exponential: exp(level G) x for a sparse symmetric generator G.

    It is one operator under ``torch.compile``, and differentiable in ``x``.

    Args:
        x: Vectors, one per row, [r, n].
        level: Time of each row, float64 [r]; a negative time applies the inverse.
        start: Offsets of the compressed sparse rows of G without its diagonal, int64 [n + 1].
        to: Column of each off-diagonal entry, int64 [e].
        rate: Value of each off-diagonal entry, float64 [e].
        leave: Sum of ``rate`` in each row, float64 [n]; the diagonal of G is -``leave``.

    Returns:
        The products, [r, n], in the dtype of ``x``.
    """
    if torch.compiler.is_compiling():  # as in rows_of
        return _expm_operator(x, level, start, to, rate, leave)
    found: Tensor = _Expm.apply(x, level, start, to, rate, leave)
    return found


def _expm(x: Tensor, level: Tensor, start: Tensor, to: Tensor, rate: Tensor, leave: Tensor) -> Tensor:
    n, fastest = x.shape[1], float(leave.max())
    if n <= _FEW and len(x) and (most := float(level.abs().max()) * fastest) * n**2 < _TABLES:
        step = _table(start, to, rate / fastest) + torch.diag((1 - leave / fastest).clamp(min=0))
        return _expm_dense(x, level * fastest, step, most)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        table = torch.sparse_csr_tensor(start, to, (rate / fastest).to(x.dtype), (n, n), check_invariants=False)
    stay = (1 - leave / fastest).clamp(min=0).to(x.dtype)[:, None]
    out = torch.empty_like(x)
    size = max(1, _CHUNK // n)
    order = level.abs().argsort(descending=True)
    for first in range(0, len(x), size):
        rows = order[first : first + size]
        mean = level[rows] * fastest
        tail = TAIL * torch.exp(-2 * (-mean).clamp(min=0))
        v = x[rows].T.contiguous()
        total = torch.zeros_like(v)
        k, active = 0, len(rows)
        while True:
            log = torch.xlogy(torch.full_like(mean, k), mean.abs()) - mean - math.lgamma(k + 1)
            weight = (log.exp() * torch.where(mean < 0, (-1.0) ** k, 1.0))[:active].to(x.dtype)
            total[:, :active] += weight * v
            k += 1
            more = torch.special.gammainc(torch.full_like(mean, k), mean.abs()) > tail
            count = int(more.sum())
            if count == 0:
                break
            if count < active:
                v, active = v[:, :count].contiguous(), count
            v = stay * v + table @ v
        out[rows] = total.T
    return out


_expm_operator = torch.library.custom_op("sedd_graph::neighbours_expm", _expm, mutates_args=())


@_expm_operator.register_fake
def _(x: Tensor, level: Tensor, start: Tensor, to: Tensor, rate: Tensor, leave: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # G is symmetric, so exp(level G) is its own transpose
    return expm(gradient.contiguous(), *ctx.saved_tensors), None, None, None, None, None


_expm_operator.register_autograd(_backward, setup_context=_save)


class _Expm(torch.autograd.Function):
    """The product as a differentiable function, for plain calls."""

    forward = staticmethod(_expm)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)
