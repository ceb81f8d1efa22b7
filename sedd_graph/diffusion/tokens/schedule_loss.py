"""How a schedule learns: the gradient that makes a loss vary less, and moves nothing else.

A bound over time is the same for every schedule between its ends; how much a draw of it varies is not (VDM, arXiv
2107.00630). Axes: b rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.diffusion.schedule import Schedule

__all__ = ["steadied"]


def steadied(nats: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """0 for each row [b], with the gradient of E[nats ** 2] / 2 in the schedule's parameters, for losses ``nats`` [b] at times
    ``t`` [b] that are drawn evenly.

    ``nats`` must be dsigma(t) times what depends on total noise and the draw at it alone. In total noise the second moment is
    then the integral of E[(nats / dsigma) ** 2] dsigma(t(sigma)), where only the last factor knows the schedule: its derivative
    is E[nats ** 2 d log dsigma], the noise held fixed. No gradient goes through a draw, so it is exact for discrete ones too.
    """
    t = t.detach()
    sigma, rate = schedule.sigma(t), schedule.dsigma(t).detach()
    held = t - (sigma - sigma.detach()) / rate  # the time at which noise is what it was, whatever the parameters
    lead = nats.detach().square() / 2 * torch.log(schedule.dsigma(held))
    return lead - lead.detach()
