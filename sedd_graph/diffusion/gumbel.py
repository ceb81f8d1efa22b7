"""Draws as arithmetic: Gumbel noise by which a categorical draw is an argmax, and the noise behind a draw that is given.

argmax(log w + g) is a draw of the law ~ w where g is standard Gumbel noise, independent for each state. Kept, the noise makes
every step of a sampler a function that can be run again, with the same weights or with others. All in float64, since float32
noise ends at 16.6 (see :mod:`sedd_graph.diffusion.categorical`). Axes: any leading axes, n states.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel", "posterior_gumbel", "replay"]

APART = 1e-9
"""What the chosen state wins by at least, which rounding cannot undo where logarithms of weights are above -1e5."""


def gumbel(*shape: int, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float64."""
    u = 1 - torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)  # in (0, 1]
    return -torch.log(-torch.log(u.clamp(max=1 - 2**-53)))


def replay(log_weights: Tensor, noise: Tensor) -> Tensor:
    """The draw that ``noise`` [..., n] makes of ``log_weights`` [..., n], int64 [...]."""
    return (log_weights.double() + noise).argmax(-1)


def posterior_gumbel(log_weights: Tensor, chosen: Tensor, *, generator: torch.Generator) -> Tensor:
    """Noise, float64 [..., n], given that it made ``chosen`` int64 [...] of ``log_weights`` [..., n] (which need not be normalised).

    The greatest sum is Gumbel at log sum w, whichever state has it; the other sums are Gumbel at log w below it (Maddison, Tarlow
    and Minka, arXiv 1411.0030). ``replay`` with the same weights gives ``chosen`` back; over draws of the weights' law the noise
    is standard Gumbel, so that with other weights it gives draws of theirs. Raises :class:`ValueError` for a chosen state of no
    weight, and for weights that are no numbers.
    """
    log_weights = log_weights.double()
    total = log_weights.logsumexp(-1)
    mine = log_weights.gather(-1, chosen[..., None])[..., 0]
    if not bool((mine.isfinite() & total.isfinite()).all()):
        raise ValueError("posterior_gumbel: a chosen state has no weight, or a weight is not finite")
    fresh = gumbel(*log_weights.shape, generator=generator)
    top = (total + fresh.gather(-1, chosen[..., None])[..., 0])[..., None]
    below = -torch.logaddexp(-(log_weights + fresh), -top)
    noise = torch.minimum(below, top - APART) - log_weights
    noise = noise.scatter(-1, chosen[..., None], top - mine[..., None])
    return torch.where(log_weights == -torch.inf, fresh, noise)  # what can never win has noise like any
