"""Tweedie steps of the reverse process, whose rounding errors are verified at run time.

Axes: b batch, l length, n states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.errors import UserError

__all__ = ["INEXACT", "LOSS", "needs_float64", "too_long", "tweedie"]

LOSS = 1e-4
"""Largest rounding error of the probabilities of a Tweedie step for which scores stay float32."""
INEXACT = 1e-2
"""Rounding error of Tweedie's probabilities at which a step is refused."""
SOUNDED = 8
"""Number of positions per row at which the effect of rounded log-scores is estimated, to save time."""


def needs_float64(kernel: Kernel, sigma: Tensor, sigma_next: Tensor) -> bool:
    """Return whether the scores of a Tweedie step must be float64, since rounding in float32 would exceed :data:`LOSS`.

    Args:
        kernel: The kernel.
        sigma: Total noise, [b].
        sigma_next: Total noise after the step, [b].
    """
    if kernel.carries_over:  # nothing is inverted
        return False
    return not kernel.amplification(sigma, sigma_next) * torch.finfo(torch.float32).eps <= LOSS


def _clamped(chances: Tensor) -> Tensor:
    """Return probabilities [..., n] as a step uses them: not negative, of sum 1."""
    kept = chances.clamp(min=0)
    return kept / kept.sum(-1, keepdim=True).clamp(min=1e-30)


def too_long(kernel: Kernel, gap: float, longest: float) -> UserError:
    """Return the error of a Tweedie step over ``longest`` of total noise whose probabilities are off by ``gap``."""
    return UserError(
        f"a Tweedie step over {longest:.3g} of total noise is too long for {type(kernel).__name__}: its probabilities "
        f"are off by {gap:.2g}; take more steps, less noise at t = 1, or the sampler 'ancestral'"
    )


def tweedie(
    kernel: Kernel,
    score: Tensor,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    unit: float = 0.0,
    length: int | None = None,
    report: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Return the next-state probabilities :meth:`Kernel.analytic`, and verify that rounding errors in them are small.

    A Tweedie step multiplies by the inverse of a transition matrix, which amplifies rounding errors by a factor that is
    exponential in the fastest rate of the kernel times the step. Two kinds of rounding are verified:

    - In the step itself: without rounding the probabilities sum to 1 for any scores.
    - In the network's log-scores. At high noise the clean tokens change log-scores by little; where log-scores are not
      close to 0 besides, as with unequal token frequencies, float32 loses this change. The effect is estimated by a
      change of all log-scores by their rounding error, at the first positions of each row. What counts is the change
      of the probabilities after negative ones are clamped, as samplers do.

    Positions with scores that are not finite are not verified.

    Args:
        kernel: The kernel.
        score: Scores, [b, l, n]; float64 where :func:`needs_float64`.
        x: Noisy rows, int64 [b, l].
        sigma: Total noise, [b].
        sigma_next: Total noise after the step, [b].
        unit: Relative rounding error of the log-scores that ``score`` is the exponential of; 0: they are not rounded.
        length: Number of positions of a row, where ``x`` has groups of its positions: the effect of rounded log-scores is
            estimated at as large a share of them. None: ``x`` has whole rows.
        report: Called with the largest error and the longest step, tensors [] on the device; None: they are verified here,
            which waits for the device.

    Returns:
        Next-state probabilities of sum 1, not clamped, [b, l, n].

    Raises:
        UserError: A probability, or the sum of the probabilities at a position, is off by more than :data:`INEXACT`; only
            without ``report``.
    """
    before, after = sigma.to(score.dtype), sigma_next.to(score.dtype)
    found = kernel.analytic(score, x, before, after)
    finite = score.sum(-1).isfinite()  # outputs that are not finite are the network's error
    apart = torch.where(finite, (found.sum(-1) - 1).abs().nan_to_num(nan=torch.inf), 0.0)
    if unit and apart.numel():
        some = len(x) if length is None else -(-len(x) * SOUNDED // max(length, SOUNDED))
        few, at = score[:some, :SOUNDED], x[:some, :SOUNDED]
        before, after, few_found, finite = before[:some], after[:some], found[:some, :SOUNDED], finite[:some]
        signs = 1.0 - 2.0 * (torch.arange(few.shape[-1], device=few.device) % 2)
        rounded = few + signs * unit * torch.xlogy(few, few).abs()
        changed = kernel.analytic(rounded, at, before, after)
        moved = (_clamped(changed) - _clamped(few_found)).abs().amax(-1)
        moved = torch.where(finite[:, :SOUNDED], moved.nan_to_num(nan=torch.inf), 0.0)
        apart = torch.cat([apart.flatten(), moved.flatten()])
    if not apart.numel():
        return found
    gap, longest = apart.max(), (sigma - sigma_next).max()
    if report is not None:
        report(gap, longest)
    elif float(gap) > INEXACT:
        raise too_long(kernel, float(gap), float(longest))
    return found
