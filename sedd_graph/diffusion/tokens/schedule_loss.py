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
    """Return zeros that, added to the loss, train the schedule to reduce the variance of the loss.

    The mean of their gradient in the schedule's parameters is the gradient of half the second moment of the loss,
    ``E[nats ** 2] / 2``. The loss must be ``nats = f * dsigma/dt``, where f depends only on total noise sigma and on
    the noisy rows at sigma. As an integral over sigma instead of t, the second moment has the integrand
    ``E[f ** 2] * dsigma/dt``, in which only ``dsigma/dt`` depends on the schedule. The gradient is therefore computed
    as that of ``nats ** 2 / 2 * log(dsigma/dt)`` at fixed sigma, with ``nats`` held constant. No gradient passes
    through the noisy rows, so it is exact for discrete tokens too.

    Args:
        nats: Loss of each row, nats, [b].
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
