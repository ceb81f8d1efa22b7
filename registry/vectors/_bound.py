"""The variational bound of processes on vectors in continuous time (VDM, arXiv 2107.00630).

Axes: b batch, l length, d width of a vector.
"""

import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.vectors.denoiser import first_time
from sedd_graph.diffusion.vectors.gaussian import along, kl, log_snr, signal, spread
from sedd_graph.diffusion.vectors.kernel import VectorKernel

__all__ = ["draw_times", "each_position", "importance"]


def draw_times(rows: int, schedule: Schedule, times: str, random: Randomness, t: Tensor | None) -> Tensor:
    """Return times from that of the lowest noise to 1, float64 [b].

    Args:
        rows: Number of rows b.
        schedule: Total noise as a function of time.
        times: ``independent`` uniform times, or ``low_discrepancy``, an even grid with one random offset.
        random: Source of random numbers.
        t: Times in place of random ones, [b]; None: drawn.
    """
    first = first_time(schedule)
    if t is None:
        u = random.low_discrepancy(rows) if times == "low_discrepancy" else random.rand(rows)
        t = first + (1 - first) * u.double()
    return t.double().clamp(min=first)


def importance(t: Tensor, kernel: VectorKernel, schedule: Schedule) -> Tensor:
    """Return snr / 2 * d gamma / dt at times ``t`` of :func:`draw_times`, float32 [b]; gamma is -log of the snr."""
    sigma, rate = kernel.sigma(schedule, t), schedule.dsigma(t)
    # d gamma / dt = (d sigma / dt) / (1 - alpha_bar); the integrand over gamma is snr / 2 |x_0 - estimate|^2
    weight = (1 - first_time(schedule)) * 0.5 * torch.exp(log_snr(sigma)) * rate / -torch.expm1(-sigma)
    return weight.float()


def each_position(clean: Tensor, found: Tensor, weight: Tensor, kernel: VectorKernel, schedule: Schedule) -> Tensor:
    """Return an unbiased estimate of the bound without the reconstruction term at each position, nats, [b, l].

    Args:
        clean: Clean vectors, [b, l, d].
        found: The network's estimate of them, [b, l, d].
        weight: The result of :func:`importance`, [b].
        kernel: The kernel.
        schedule: Total noise as a function of time.
    """
    end = kernel.sigma(schedule, torch.ones(1, dtype=torch.float64, device=clean.device))
    mean = along(signal(end), clean) * clean
    last = kl(mean, spread(end), torch.zeros_like(mean), torch.ones_like(end)).sum(-1)
    return weight[:, None] * (clean - found).square().sum(-1) + last
