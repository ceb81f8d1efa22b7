"""Step matrices of D3PM (arXiv 2107.03006, appendix A.2) for small vocabularies, in float64.

Column convention: entry [z, y] is the probability of state z after the step, given y before it. All matrices here are
symmetric (those of Sinkhorn's iteration up to its error), so the uniform distribution is stationary. Axes: T steps, n states, d embedding width, k neighbours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sedd_graph.errors import UserError

from ._neighbour_graph import components, edges, nearest

__all__ = ["balanced", "check_columns", "exchange_rates", "gaussian_steps", "rate_steps", "share_steps"]

SINKHORN = 100
"""Number of Sinkhorn iterations, as in D3PM's code."""
COLUMN = 1e-6
"""Largest accepted deviation of the sum of a given column from 1."""
ROW = 1e-2
"""Largest accepted deviation of the sum of a row from 1 after Sinkhorn's iteration, whose columns sum to 1 exactly."""


def gaussian_steps(betas: Tensor, states: int) -> Tensor:
    """Return the step matrices of the discretised Gaussian (appendix A.2.3), whose squared width is beta.

    The probability of moving from i to j is the weight of j - i in a softmax of -4 k^2 / ((n - 1)^2 beta) over k from
    -(n - 1) to n - 1; a token remains with the remaining probability.

    Args:
        betas: Squared widths, float64 [T], above 0.
        states: Number of states n.

    Returns:
        float64 [T, n, n], symmetric.
    """
    apart = torch.arange(states, dtype=torch.float64)
    offsets = torch.cat([apart, apart[1:]])
    weights = (-4 * offsets.square() / ((states - 1) ** 2 * betas[:, None])).softmax(1)[:, :states]
    place = torch.arange(states)
    steps = weights[:, (place[:, None] - place).abs()]
    return _with_rest(steps)


def _with_rest(moves: Tensor) -> Tensor:
    """Return matrices [T, n, n] with the diagonal that makes each column sum to 1."""
    moves = moves - torch.diag_embed(moves.diagonal(dim1=1, dim2=2))
    return moves + torch.diag_embed(1 - moves.sum(1))


def _adjacency(points: Tensor, k: int) -> Tensor:
    """Return A + A^T, where A marks the ``k`` nearest other points of each of ``points`` [n, d], float64 [n, n].

    Raises:
        UserError: The graph is disconnected, so the process has no unique stationary distribution.
    """
    n = len(points)
    start, to, weight = edges(nearest(points, min(k, n - 1)))
    if (pieces := components(n, start, to)) > 1:
        raise UserError(
            f"steps: the graph of {k} nearest neighbours falls into {pieces:,} pieces, so the process has no unique prior; "
            "raise 'neighbours'"
        )
    found = torch.zeros(n, n, dtype=torch.float64)
    found[start, to] = weight
    return found


def balanced(points: Tensor, k: int) -> Tensor:
    """Return the doubly stochastic matrix of the nearest neighbours by Euclidean distance: Sinkhorn on A + A^T.

    Args:
        points: Embeddings, float32 [n, d].
        k: Number of neighbours of each point.

    Returns:
        float64 [n, n], with a diagonal of 0.

    Raises:
        UserError: The graph is disconnected, or no doubly stochastic matrix has its edges.
    """
    found = _adjacency(points, k)
    for _ in range(SINKHORN):
        found = found / found.sum(1, keepdim=True)
        found = found / found.sum(0)
    off = float((found.sum(1) - 1).abs().max())
    if off > ROW:
        raise UserError(
            f"steps: Sinkhorn's iteration does not balance the graph of {k} nearest neighbours (rows are {off:.2g} off after "
            f"{SINKHORN} iterations); raise 'neighbours', or take form: nearest_rate"
        )
    return found


def share_steps(betas: Tensor, balanced: Tensor) -> Tensor:
    """Return the matrices (1 - beta) I + beta S, float64 [T, n, n], for ``betas`` [T] and S ``balanced`` [n, n]."""
    eye = torch.eye(len(balanced), dtype=torch.float64)
    return eye + betas[:, None, None] * (balanced - eye)


def exchange_rates(points: Tensor, k: int) -> Tensor:
    """Return the rates (A + A^T) / 2k of the nearest neighbours by the cosine of embeddings, minus their sums.

    Args:
        points: Embeddings, float32 [n, d].
        k: Number of neighbours of each point.

    Returns:
        float64 [n, n], symmetric; columns sum to 0.

    Raises:
        UserError: The graph is disconnected.
    """
    rates = _adjacency(F.normalize(points, dim=1), k) / (2 * min(k, len(points) - 1))
    return rates - torch.diag(rates.sum(0))


def rate_steps(betas: Tensor, rates: Tensor) -> Tensor:
    """Return the matrices exp(beta R), float64 [T, n, n], for ``betas`` [T] and symmetric rates R [n, n]."""
    modes, basis = torch.linalg.eigh(rates)
    steps = (basis * torch.exp(betas[:, None] * modes)[:, None]) @ basis.T
    return _with_rest(steps.clamp(min=0))


def check_columns(steps: Tensor, source: str) -> Tensor:
    """Return given step matrices [T, n, n] with columns scaled to sum to 1.

    Args:
        steps: Step matrices, float64 [T, n, n].
        source: What holds them, for error messages.

    Raises:
        UserError: An entry is negative, or a column does not sum to 1.
    """
    wrong = (steps < 0).any(1) | ~((steps.sum(1) - 1).abs() <= COLUMN)
    if bool(wrong.any()):
        step, column = wrong.nonzero()[0].tolist()
        total = float(steps[step, :, column].sum())
        raise UserError(
            f"steps: column {column} of step {step + 1} of {source} sums to {total:.6g}, or has a negative entry; entry [z][y] is "
            "the probability of state z after the step given y before it, so every column sums to 1"
        )
    return steps / steps.sum(1, keepdim=True)
