"""The gradient for training a schedule: it reduces the variance of the loss, whose expectation is unchanged.

A bound that is an integral over time depends on the schedule only through total noise at t = 0 and t = 1, but the
variance of a Monte Carlo estimate depends on the whole schedule (VDM, arXiv 2107.00630). Axes: b rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.schedule import Schedule

__all__ = ["steadied"]


def steadied(nats: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return zeros whose gradient in the schedule's parameters is that of ``E[nats ** 2] / 2``.

    Added to the loss, these zeros train the schedule to reduce the variance of the loss. The loss ``nats`` must be
    dsigma/dt times a function f of only total noise and the noisy rows at that noise. Written as an integral over total
    noise, its second moment ``E[nats ** 2]`` has the integrand ``E[f ** 2] * dsigma(t(sigma))``, in which only the
    factor ``dsigma`` depends on the schedule. The gradient is therefore that of ``E[nats ** 2 * log(dsigma)]`` at fixed
    total noise, with ``nats`` held constant. No gradient passes through the noisy rows, so that the gradient is exact
    for discrete tokens.

    Args:
        nats: Losses, nats, [b].
        t: Times of the losses, uniform in [0, 1], [b].
        schedule: A schedule with trained parameters.

    Returns:
        Zeros, [b].
    """
    t = t.detach()
    sigma, rate = schedule.sigma(t), schedule.dsigma(t).detach()
    held = t - (sigma - sigma.detach()) / rate  # to first order, the time of the same noise for any parameters
    lead = nats.detach().square() / 2 * torch.log(schedule.dsigma(held))
    return lead - lead.detach()
