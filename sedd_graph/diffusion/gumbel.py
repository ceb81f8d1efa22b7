"""Gumbel-max sampling, and posterior sampling of the Gumbel noise given the sampled states.

If g is standard Gumbel noise, independent for each state, argmax(log w + g) is a categorical sample with weights w.
With the noise stored, a sampler can be run again with the same weights or with other weights. All noise is float64,
since float32 noise never exceeds 16.6 (see :mod:`sedd_graph.diffusion.categorical`). Axes: any leading axes, n states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import take

__all__ = ["gumbel", "posterior_changes", "posterior_gumbel", "replay", "standard_gumbel"]

APART = 1e-9
"""Smallest margin by which log-weight plus noise of the chosen state exceeds that of any other state.

:func:`posterior_gumbel` enforces it. It is larger than rounding errors if log-weights are above -1e5.
"""


def gumbel(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise, float64 of shape ``[*shape]``, on the device of ``generator``."""
    u = 1 - torch.rand(*shape, generator=generator, device=generator.device, dtype=torch.float64)  # in (0, 1]
    return -torch.log(-torch.log(u.clamp(max=1 - 2**-53)))


def standard_gumbel(u: Tensor) -> Tensor:
    """Return the Gumbel noise with distribution function values ``u``, float64 in (0, 1), of the same shape."""
    return -torch.log(-torch.log(u))


def replay(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Return the Gumbel-max sample argmax(log_weights + noise).

    Args:
        log_weights: [..., n], not normalised.
        noise: Gumbel noise, float64 [..., n].

    Returns:
        States, int64 [...].
    """
    return (log_weights.double() + noise).argmax(-1)


def posterior_gumbel(log_weights: Tensor, chosen: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw Gumbel noise given the states that it selected (Maddison, Tarlow and Minka, arXiv 1411.0030).

    Let w be the weights of the n states. The maximum of log w + noise over states is Gumbel with location log(sum of
    w), whichever state attains it. At each other state, log w + noise is Gumbel with location log w, truncated to
    values below the maximum. :func:`replay` with the returned noise and the same weights returns ``chosen``. If
    ``chosen`` is itself a sample from the weights, the noise is standard Gumbel, so that :func:`replay` with other
    weights samples from the other weights.

    Args:
        log_weights: log w, [..., n], not normalised; minus infinity for impossible states.
        chosen: The selected states, int64 [...].
        generator: Random number generator on the device of ``log_weights``.

    Returns:
        Gumbel noise, float64 [..., n].

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


def posterior_changes(log_weights: Tensor, chosen: Tensor, fresh: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
    """Change as little of given Gumbel noise as makes it noise given the states that it selected.

    The result has the distribution of :func:`posterior_gumbel`, by rejection: noise of a state that is not chosen and
    lies below the maximum is retained; only noise above it is drawn again, from the truncated Gumbel distribution. The
    maximum exceeds log(sum of w) by a standard Gumbel number G, and the number of states above it is Poisson with mean
    at most exp(-G), so that on average at most one state besides the chosen one changes, however many there are. The
    noise is therefore stored as the seed of ``fresh`` and few changes.

    Args:
        log_weights: log w, float64 [..., n], not normalised; minus infinity for impossible states.
        chosen: The selected states, int64 [...], of positive weight.
        fresh: Standard Gumbel noise, float64 [..., n].
        again: Other standard Gumbel noise, independent of ``fresh``, float64 [..., n].

    Returns:
        The noise, float64 [..., n], and the states at which it differs from ``fresh``, bool [..., n].
    """
    top = (log_weights.logsumexp(-1) + take(fresh, chosen))[..., None]
    above = log_weights + fresh > top - APART
    below = torch.minimum(-torch.logaddexp(-(log_weights + again), -top), top - APART) - log_weights
    noise = torch.where(above, below, fresh)
    noise = noise.scatter(-1, chosen[..., None], top - take(log_weights, chosen)[..., None])
    return noise, above.scatter(-1, chosen[..., None], True)
