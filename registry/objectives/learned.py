"""Objectives that train the noise with the network.

Axes: b batch, l length, c draws for each row, m data tokens.
"""

from collections.abc import Mapping
from typing import Annotated

import pydantic
import torch
from torch import Tensor

from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective

from ..noise.masking import TokenMasking
from .bounds import OverTime, TimeConfig, counted

__all__ = ["GenMD4"]


class GenMD4(OverTime, kind="objective"):
    """The bound of masking by token, with all that depends on a learned pace (GenMD4, arXiv 2406.04329, section 4 and appendix G).

    Two corrupted rows are drawn for each clean one: their losses set each other's baseline in the gradient that comes through
    the draws (REINFORCE, leave one out). Below ``t_min`` a mask is decoded by the chance of each token to be masked by then,
    which costs something: without it, masking everything at once would come free.
    """

    reads = ("log_x0",)
    trains_noise = True
    steady = False  # what is masked before ``t_min`` is counted, and depends on the schedule
    pairs = True
    """Whether rows are drawn twice, which the gradient asks for and the bound does not."""

    class Config(TimeConfig):
        t_min: Annotated[float, pydantic.Field(gt=0, lt=0.1)] = 1e-5

    def bound(self) -> Objective:
        single = GenMD4(self.config, self.context)
        single.pairs = False
        return single

    def lacks(self, kernel: Kernel) -> str | None:
        return None if isinstance(kernel, TokenMasking) else "a kernel that masks by token"

    def corrupt(
        self,
        batch: Batch,
        kernel: Kernel,
        schedule: Schedule,
        *,
        random: Randomness,
        t: Tensor | None = None,
        xt: Tensor | None = None,
    ) -> Draw:
        first = super().corrupt(batch, kernel, schedule, random=random, t=t, xt=xt)
        if xt is not None or not self.pairs:
            return first
        again = kernel.sample(batch.tokens, first.sigma, random=random, corrupt=batch.corrupt)
        twice = (torch.cat([v, v]) for v in (first.t, first.sigma, first.dsigma, first.weight))
        return Draw(torch.cat([first.xt, again]), *twice)

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        assert isinstance(kernel, TokenMasking)
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
            out = out + (lead - lead.detach())  # a gradient, and no value
        return out

    def _start(self, tokens: Tensor, kernel: TokenMasking, schedule: Schedule) -> Tensor:
        """-log p(x_0 | x at t_min) in the mean, [b, l]: nothing where it is seen, and else by the chance to be masked so early."""
        t = torch.full((1,), self.config.t_min, device=tokens.device)
        log_hit = kernel.token_schedules(schedule.sigma(t))[1][0]
        law = log_hit.log_softmax(-1)
        cost: Tensor = (-log_hit.exp() * law)[tokens]
        return cost
