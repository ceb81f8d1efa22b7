"""Training objectives: bounds on -log p(x_0) in nats per sequence, and the draws that estimate them.

Left out of every bound here, as in the literature: the prior term KL(p_1 | prior), of the order of
exp(-sigma(1)) * length * log(vocabulary), and for the objectives over time the stretch below ``t_min``.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.batch import Batch, Draw, Randomness
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective


class TimeConfig(ComponentConfig):
    """How times are drawn."""

    times: Literal["low_discrepancy", "independent"] = "low_discrepancy"
    """``low_discrepancy``: one offset and an even grid over the global batch; less variance, no bias."""
    t_min: Annotated[float, pydantic.Field(gt=0, lt=0.1)] = 1e-4

    def draw(self, batch: Batch, random: Randomness, t: Tensor | None) -> tuple[Tensor, float]:
        """Times float32 [b] from ``t_min`` on and the width of what they are from; a given ``t`` stays, of width 1."""
        if t is not None:
            return t, 1.0
        rows = len(batch)
        u = random.low_discrepancy(rows) if self.times == "low_discrepancy" else random.rand(rows)
        return self.t_min + (1 - self.t_min) * u.to(batch.tokens.device), 1 - self.t_min


class OverTime(Objective):
    """An integral over t in [t_min, 1], drawn evenly."""

    steady = True

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
        t, width = self.config.draw(batch, random, t)
        sigma, dsigma = schedule.sigma(t).detach(), schedule.dsigma(t).detach()
        if xt is None:
            xt = kernel.sample(batch.tokens, sigma, random=random, corrupt=batch.corrupt)
        return Draw(xt, t, sigma, dsigma, torch.full_like(t, width))


def _mask(kernel: Kernel) -> int:
    """The index of the mask, for objectives that need one: with another kernel they are refused when the process is made."""
    assert kernel.mask is not None
    return kernel.mask


def counted(per_position: Tensor, batch: Batch) -> Tensor:
    """The sum over the positions that count, [b]."""
    return torch.where(batch.loss & batch.corrupt, per_position, 0.0).sum(-1)


class ScoreEntropy(OverTime, kind="objective"):
    """Denoising score entropy (SEDD, arXiv 2310.16834, theorem 3.6), for any kernel."""

    reads = ("log_score", "log_x0")

    class Config(TimeConfig):
        pass

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        if "log_score" in outputs:
            log_score = outputs["log_score"].float()
        else:
            log_score = kernel.log_score(outputs["log_x0"].float(), draw.xt, draw.sigma)
        entropy = kernel.score_entropy(log_score, draw.xt, batch.tokens, draw.sigma)
        return draw.weight * draw.dsigma * counted(entropy, batch)


class Nelbo(OverTime, kind="objective"):
    """The bound of a head that predicts the clean token: MDLM for absorb (arXiv 2406.07524, eq. 11), UDLM for uniform, GIDD for mixtures.

    The head's optimum is the posterior of the clean token given all other positions.
    """

    reads = ("log_x0",)

    class Config(TimeConfig):
        pass

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        per_position = kernel.nelbo(outputs["log_x0"].float(), draw.xt, batch.tokens, draw.sigma)
        return draw.weight * draw.dsigma * counted(per_position, batch)

    def bound_draw(
        self, batch: Batch, kernel: Kernel, schedule: Schedule, *, random: Randomness
    ) -> tuple[Objective, Draw]:
        if not kernel.masks_evenly:
            return super().bound_draw(batch, kernel, schedule, random=random)
        count = MaskedCount(MaskedCount.Config(), self.context)
        return count, count.corrupt(batch, kernel, schedule, random=random)


class MaskedCount(Objective, kind="objective"):
    """The same bound as ``nelbo`` with absorb, as a sum over how many tokens are masked rather than an integral over time.

    k of the L tokens that may be corrupted are masked, k evenly from 1 to L, and the cross-entropy on them is weighted
    by L/k (arXiv 2406.03736, eq. 3.6): exact, with no schedule in it and less variance.
    """

    reads = ("log_x0",)
    needs_mask = True
    over = "masked"

    class Config(ComponentConfig):
        counts: Literal["low_discrepancy", "independent"] = "low_discrepancy"

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
        rows = batch.tokens.shape[0]
        free = batch.corrupt.sum(-1)
        if xt is None:
            if t is None:
                even = self.config.counts == "low_discrepancy"
                t = (random.low_discrepancy(rows) if even else random.rand(rows)).to(batch.tokens.device)
            count = (1 + (t * free).long()).clamp(max=free)
            order = random.rand(*batch.tokens.shape).to(batch.tokens.device).masked_fill(~batch.corrupt, 2.0)
            rank = order.argsort(-1).argsort(-1)
            xt = batch.tokens.masked_fill((rank < count[:, None]) & batch.corrupt, _mask(kernel))
        count = ((xt == _mask(kernel)) & batch.corrupt).sum(-1)
        share = count / free.clamp(min=1)
        # sigma at which this share is expected: what a time-conditioned network is told
        sigma = -torch.log1p(-share.clamp(max=1 - 1e-3))
        weight = free / count.clamp(min=1)
        return Draw(xt, share, sigma, torch.ones_like(sigma), weight.float())

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        log_x0 = outputs["log_x0"].float().gather(-1, batch.tokens[..., None])[..., 0]
        return draw.weight * counted(torch.where(draw.xt == _mask(kernel), -log_x0, 0.0), batch)
