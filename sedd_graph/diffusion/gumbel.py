"""Gumbel-max draws, and the Gumbel noise behind a draw that is already made.

argmax(log w + g) is a categorical draw with weights w when g is standard Gumbel noise, independent for each state. A sampler
that stores the noise can be run again, with the same weights or with others. All in float64, since float32 noise ends at
16.6 (see :mod:`sedd_graph.diffusion.categorical`). Axes: any leading axes, n states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import take

__all__ = ["gumbel", "posterior_gumbel", "replay"]

APART = 1e-9
"""Smallest margin by which the chosen state wins; rounding cannot undo it where log-weights are above -1e5."""


def gumbel(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise, float64 ``[*shape]``."""
    u = 1 - torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)  # in (0, 1]
    return -torch.log(-torch.log(u.clamp(max=1 - 2**-53)))


def replay(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Return the draw that ``noise`` [..., n] makes with ``log_weights`` [..., n], int64 [...]."""
    return (log_weights.double() + noise).argmax(-1)


def posterior_gumbel(log_weights: Tensor, chosen: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw Gumbel noise given the draw that it made (Maddison, Tarlow and Minka, arXiv 1411.0030).

    The largest sum of log-weight and noise is Gumbel at log sum w, whichever state has it; the other sums are Gumbel at
    log w, truncated below it. :func:`replay` with the same weights returns ``chosen``. If ``chosen`` is itself drawn from the
    weights, the noise is standard Gumbel, so that with other weights it makes draws from those.

    Args:
        log_weights: [..., n], not normalised; minus infinity for impossible states.
        chosen: int64 [...].
        generator: On the device of ``log_weights``.

    Returns:
        float64 [..., n].

    Raises:
        ValueError: A chosen state has weight zero, or a weight is NaN or infinite.
    """
    log_weights = log_weights.double()
    total = log_weights.logsumexp(-1)
    mine = take(log_weights, chosen)
    if not bool((mine.isfinite() & total.isfinite()).all()):
        raise ValueError("posterior_gumbel: a chosen state has no weight, or a weight is not finite")
    fresh = gumbel(*log_weights.shape, generator=generator)
    top = (total + take(fresh, chosen))[..., None]
    below = -torch.logaddexp(-(log_weights + fresh), -top)
    noise = torch.minimum(below, top - APART) - log_weights
    noise = noise.scatter(-1, chosen[..., None], top - mine[..., None])
    return torch.where(log_weights == -torch.inf, fresh, noise)  # an impossible state has unconditioned noise
