"""Diffusion in a number of steps (D3PM, arXiv 2107.03006): any kernel, looked at on a grid of times.

Axes: b batch, l length, n states.
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

from .bounds import counted

__all__ = ["D3PM"]

END = 30.0
"""Total noise at the last step: what is left of a token is exp(-30), so that the prior is met and nothing of the bound is left out."""
END_OF_MODES = 12.0
"""The same for kernels whose law is positive everywhere: KL(q(x_T | x_0) || prior) falls as exp(-24), and exp(-step Q) stays a number."""


class D3PM(Objective, kind="objective"):
    """D3PM's bound on -log p(x_0): the sum over ``steps`` of KL(q(x_s | x_t, x_0) || p(x_s | x_t)), and ``auxiliary`` cross-entropy.

    Step i goes from total noise sigma(i / steps) to sigma((i - 1) / steps); the first ends at the clean token, where the KL is
    -log p(x_0 | x_1), and the last begins in noise outright, so that the prior costs nothing. A head that puts out ``log_x0``
    gives p(x_s | x_t) as the mixture over its clean tokens (their eq. 4); one of ``log_score`` gives it as Tweedie's step. The
    auxiliary term (their eq. 5) trains, and is left out of the bound that is reported.
    """

    reads = ("log_x0", "log_score")

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 1000
        auxiliary: Annotated[float, pydantic.Field(ge=0, le=100)] = 0.0
        """Weight of -log p(x_0 | x_t), for each position; D3PM takes 0.01 for text."""
        times: Literal["low_discrepancy", "independent"] = "low_discrepancy"

    def bound(self) -> Objective:
        if self.config.auxiliary == 0:
            return self
        return D3PM(self.config.model_copy(update={"auxiliary": 0.0}), self.context)

    def levels(self, step: Tensor, schedule: Schedule, kernel: Kernel) -> Tensor:
        """Total noise, float32 [b], after ``step`` of them, int64 [b] from 0 to ``steps``."""
        t = (step / self.config.steps).float()
        inner = schedule.sigma(t.clamp(min=1e-9)).clamp(max=END)
        last = inner.clamp(min=END_OF_MODES if kernel.mask is None else END)
        return torch.where(step == 0, 0.0, torch.where(step == self.config.steps, last, inner))

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
        rows, steps = batch.tokens.shape[0], self.config.steps
        weight = float(steps)
        if t is None:
            even = self.config.times == "low_discrepancy"
            u = (random.low_discrepancy(rows) if even else random.rand(rows)).to(batch.tokens.device)
            step = (u.double() * steps).long() + 1
        else:
            step = (t.double() * steps).round().long().clamp(1, steps)
        sigma = self.levels(step, schedule, kernel)
        if xt is None:
            xt = kernel.sample(batch.tokens, sigma, random=random, corrupt=batch.corrupt)
        t = (step / steps).float()
        return Draw(xt, t, sigma, torch.ones_like(sigma), torch.full_like(t, weight))

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        step = (draw.t.double() * self.config.steps).round().long()
        below, clean = self.levels(step - 1, schedule, kernel), torch.zeros_like(draw.sigma)
        one = torch.nn.functional.one_hot(batch.tokens, kernel.states).to(draw.sigma.dtype)
        true = kernel.posterior(one, draw.xt, draw.sigma, below)
        told = self._posterior(outputs, draw, kernel, below)
        loss = draw.weight * counted(divergence(true, told), batch)
        if self.config.auxiliary > 0:
            guess = self._posterior(outputs, draw, kernel, clean).gather(-1, batch.tokens[..., None])[..., 0]
            loss = loss - self.config.auxiliary * draw.weight * counted(guess.clamp(min=_tiny(guess)).log(), batch)
        return loss

    def _posterior(self, outputs: Mapping[str, Tensor], draw: Draw, kernel: Kernel, below: Tensor) -> Tensor:
        """The model's law of the state at total noise ``below`` [b], [b, l, n]."""
        if "log_x0" in outputs:
            return kernel.posterior(outputs["log_x0"].float().exp(), draw.xt, draw.sigma, below)
        score = outputs["log_score"].float().exp()
        # scores that are of no law give chances below 0: put right, what is left is one
        law = kernel.analytic(score, draw.xt, draw.sigma, below).clamp(min=0)
        return law / law.sum(-1, keepdim=True).clamp(min=_tiny(law))


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)


def divergence(true: Tensor, told: Tensor) -> Tensor:
    """KL(true || told) over the last axis, nats, as a sum of terms that are nowhere negative: both laws sum to 1."""
    # where both are nearly certain of one state, sums of the logarithms alone would be all rounding
    safe = told.clamp(min=_tiny(told))
    terms = torch.xlogy(true, true) - true * safe.log() - true + told
    return terms.sum(-1)
