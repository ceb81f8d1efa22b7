"""Objective that trains the parameters of a kernel together with the network.

Axes: b batch, l length, m data tokens.
"""

from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective
from sedd_graph.errors import UserError

from ..noise.masking import TokenMasking
from .bounds import OverTime, TimeConfig, counted

__all__ = ["GenMD4"]


class GenMD4(OverTime, kind="objective"):
    """Negative ELBO under a kernel with a masking rate per token, nats, which also trains the rates (GenMD4).

    The objective is that of arXiv 2406.04329. The distribution of the noisy rows depends on the rates, so their
    gradient has a REINFORCE term. Two noisy rows are drawn for each clean row, and the loss of each is the baseline of
    the other (leave-one-out, section 4 and appendix G of the paper). The bound, in nats, includes the cost of decoding
    tokens that are masked before ``t_min``; without this cost, masking all tokens before ``t_min`` would minimise the
    loss.
    """

    reads = ("log_x0",)
    trains_noise = True
    steady = False  # the cost of tokens masked before ``t_min`` depends on the schedule
    slack = 0.03  # tokens masked before ``t_min`` are decoded without context
    pairs = True
    """True if two noisy rows are drawn for each clean row, which the gradient in the masking rates requires."""

    class Config(TimeConfig):
        t_min: Annotated[float, pydantic.Field(gt=0, lt=0.1)] = 1e-5
        """Lower end of the interval of times, above 0 and below 0.1. The bound includes the cost of tokens masked
        before ``t_min``."""

    config: Config

    def bound(self) -> Objective:
        single = GenMD4(self.config, self.context)
        single.pairs = False
        return single

    def lacks(self, kernel: Kernel) -> str | None:
        return None if isinstance(kernel, TokenMasking) else "a kernel with a masking rate for each token"

    def draw(self, request: DrawRequest) -> Draw:
        first = super().draw(request)
        if request.xt is not None or not self.pairs:
            return first
        twice = (torch.cat([v, v]) for v in (first.t, first.sigma, first.dsigma, first.weight))
        return Draw(torch.cat([first.xt, request.noised(first.sigma)]), *twice)

    def reconstruction_draw(self, request: DrawRequest) -> Draw | None:
        return None  # the loss includes the cost of tokens that are masked before t_min

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        if not isinstance(kernel, TokenMasking):
            raise UserError(f"genmd4 needs {self.lacks(kernel)}")
        copies = len(draw.xt) // len(batch)
        tokens, corrupt = torch.cat([batch.tokens] * copies), torch.cat([batch.corrupt] * copies)
        per_position = kernel.nelbo(outputs["log_x0"].float(), draw.xt, tokens, draw.sigma)
        counts = corrupt & torch.cat([batch.loss] * copies)
        nats = draw.weight * draw.dsigma * torch.where(counts, per_position, 0.0).sum(-1)
        nats = nats.reshape(copies, len(batch))
        out = nats.mean(0) + counted(self._start(batch.tokens, kernel, schedule), batch)
        if copies == 2 and kernel.learned:
            log_keep, log_hit, _ = (v.gather(1, tokens) for v in kernel.token_schedules(draw.sigma))
            chance = torch.where(draw.xt == kernel.mask, log_hit, log_keep)
            chance = torch.where(corrupt, chance, 0.0).sum(-1).reshape(copies, len(batch))
            lead = 0.5 * (nats[0] - nats[1]).detach() * (chance[0] - chance[1])
            out = out + (lead - lead.detach())  # changes the gradient, not the value
        return out

    def _start(self, tokens: Tensor, kernel: TokenMasking, schedule: Schedule) -> Tensor:
        """Return the mean of -log p(x_0 | x at t_min), nats, [b, l]; p is proportional to the masking probabilities."""
        t = torch.full((1,), self.config.t_min, device=tokens.device)
        log_hit = kernel.token_schedules(schedule.sigma(t))[1][0]
        cost: Tensor = (-log_hit.exp() * log_hit.log_softmax(-1))[tokens]
        return cost
