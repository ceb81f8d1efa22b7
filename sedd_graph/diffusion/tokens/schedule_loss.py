"""The gradient that trains a schedule: it reduces the variance of the loss, whose expectation is unchanged.

A bound over time depends on the schedule only through its two ends; the variance of one draw depends on all of it (VDM, arXiv
2107.00630). Axes: b rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.schedule import Schedule

__all__ = ["steadied"]


def steadied(nats: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return 0 for each row, with the gradient of E[nats ** 2] / 2 in the parameters of the schedule.

    The loss must be dsigma(t) times a function of total noise and of the draw at that noise alone. As an integral over total
    noise, the second moment is that of E[(nats / dsigma) ** 2] dsigma(t(sigma)), in which only the last factor depends on the
    schedule. Its gradient is E[nats ** 2 d log dsigma] at fixed noise. No gradient passes through a draw, so it is exact for
    discrete draws.

    Args:
        nats: Losses, [b].
        t: Times of the losses, uniform, [b].
        schedule: The schedule with parameters.

    Returns:
        Zeros, [b].
    """
    t = t.detach()
    sigma, rate = schedule.sigma(t), schedule.dsigma(t).detach()
    held = t - (sigma - sigma.detach()) / rate  # to first order, the time of the same noise for any parameters
    lead = nats.detach().square() / 2 * torch.log(schedule.dsigma(held))
    return lead - lead.detach()
