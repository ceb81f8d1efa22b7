"""Algebra of variance-preserving Gaussian diffusion: marginals, posteriors and KL divergences.

Total noise sigma gives the signal level alpha_bar = exp(-sigma): x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise. All
functions are elementwise; ``sigma`` is float64 [b]. Axes: b batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sedd_graph.diffusion.numerics import log_expm1

__all__ = ["Posterior", "along", "kl", "log_snr", "noise_std", "posterior", "signal", "spread"]


class Posterior(NamedTuple):
    """Distribution of x_s given x_t, for s < t: normal with mean ``start * m + noisy * x_t`` in each coordinate.

    Attributes:
        start: Coefficient of the mean m of x_0, [b].
        noisy: Coefficient of x_t, [b].
        variance: Variance of each coordinate, [b].
    """

    start: Tensor
    noisy: Tensor
    variance: Tensor

    def mean(self, start: Tensor, noisy: Tensor) -> Tensor:
        """Return the mean of x_s, [b, ...], given the mean of x_0 (``start``) and x_t (``noisy``), both [b, ...]."""
        return along(self.start, start) * start + along(self.noisy, noisy) * noisy


def along(value: Tensor, x: Tensor) -> Tensor:
    """Return ``value`` [b] in the dtype of ``x`` [b, ...], with axes of size 1 appended, to be multiplied with ``x``."""
    return value.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def signal(sigma: Tensor) -> Tensor:
    """Return the coefficient sqrt(alpha_bar) of x_0 in x_t, the shape of ``sigma``."""
    return torch.exp(-sigma / 2)


def noise_std(sigma: Tensor) -> Tensor:
    """Return the standard deviation sqrt(1 - alpha_bar) of x_t given x_0, the shape of ``sigma``."""
    return torch.sqrt(-torch.expm1(-sigma))


def log_snr(sigma: Tensor) -> Tensor:
    """Return the log signal-to-noise ratio log(alpha_bar / (1 - alpha_bar)), the shape of ``sigma``; sigma > 0."""
    return -log_expm1(sigma)


def spread(sigma: Tensor, start_variance: float | Tensor = 0.0) -> Tensor:
    """Return the variance of x_t, of the shape of ``sigma``.

    Args:
        sigma: Total noise.
        start_variance: Variance of x_0; 0: x_0 is given.
    """
    return torch.exp(-sigma) * start_variance - torch.expm1(-sigma)


def posterior(lower: Tensor, sigma: Tensor, start_variance: float | Tensor = 0.0) -> Posterior:
    """Return the distribution of x_s given x_t, for x_0 ~ N(m, start_variance).

    With ``start_variance`` 0 it is q(x_{t-1} | x_t, x_0) of DDPM (arXiv 2006.11239, equations 6 and 7).

    Args:
        lower: Total noise at s, [b]; 0 at s = 0.
        sigma: Total noise at t, [b], above ``lower``.
        start_variance: Variance of x_0; 0: x_0 = m is given.
    """
    step, beta = torch.exp((lower - sigma) / 2), -torch.expm1(lower - sigma)
    below, above = spread(lower, start_variance), spread(sigma, start_variance)
    return Posterior(signal(lower) * beta / above, step * below / above, below * beta / above)


def kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(other_mean, other_variance)) of each coordinate, nats, [b, ...].

    Args:
        mean: [b, ...].
        variance: [b], positive.
        other_mean: [b, ...].
        other_variance: [b], positive.
    """
    ratio = variance / other_variance
    shape = 0.5 * (ratio - 1 - torch.log(ratio))
    distance = (mean - other_mean).square() / 2
    return along(shape, distance) + distance / along(other_variance, distance)
