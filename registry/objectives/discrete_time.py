"""Objective of diffusion in discrete time (D3PM, arXiv 2107.03006), for any kernel.

Axes: b batch, l length, n states.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import pydantic
import torch
from torch import Tensor

from sedd_graph.component.base import ComponentConfig
from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.numerics import take, tiny
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import DrawRequest, Objective, lower_posterior

from .bounds import Times, counted, uniform

__all__ = ["D3PM"]

END = 30.0
"""Total noise at the last step, for kernels with a mask: alpha = exp(-30), so the prior term of the bound is
negligible."""
END_OF_MODES = 12.0
"""Least total noise at the last step, for kernels without mask: KL(q(x_T | x_0) || prior) is then of the order of
exp(-24), while the inverse transition matrix of a Tweedie step stays finite."""


class D3PM(Objective, kind="objective"):
    """Bound of D3PM on -log p(x_0) in discrete time, nats, with an optional auxiliary cross-entropy (arXiv 2107.03006).

    With ``steps`` = T, the bound is the sum over i from 1 to T of KL(q(x_s | x_t, x_0) || p(x_s | x_t)), where t is i /
    T and s is (i - 1) / T; one random i per row estimates the sum. Step 1 ends at the clean token, where the KL
    divergence is -log p(x_0 | x_t); step T starts at the prior. For the network output ``log_x0``, p(x_s | x_t) is a
    mixture over clean tokens (eq. 4 of the paper); for ``log_score`` it is Tweedie's step (SEDD, theorem 4.2). The
    auxiliary cross-entropy (eq. 5) is added to the training loss only, not to the bound.
    """

    reads = ("log_x0", "log_score")

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 1000
        """Number of time steps of the process, from 1 to 1,000,000."""
        auxiliary: Annotated[float, pydantic.Field(ge=0, le=100)] = 0.0
        """Weight of the auxiliary cross-entropy -log p(x_0 | x_t) of each position, from 0 to 100; 0.01 in the paper
        for text."""
        times: Times = "low_discrepancy"
        """Distribution of the time steps of a global batch. ``low_discrepancy``: an even grid with one random offset
        (less variance, no bias); ``independent``: independent uniform steps."""

    config: Config

    def bound(self) -> Objective:
        if self.config.auxiliary == 0:
            return self
        return D3PM(self.config.model_copy(update={"auxiliary": 0.0}), self.context)

    def differs(self) -> str | None:
        return "the auxiliary cross-entropy is added" if self.config.auxiliary > 0 else None

    @property
    def measure(self) -> Literal["time", "masked", "steps"]:
        return "steps"

    def below(self, draw: Draw, kernel: Kernel, schedule: Schedule) -> Tensor:
        step = (draw.t.double() * self.config.steps).round().long()
        return self.levels(step - 1, schedule, kernel)

    def levels(self, step: Tensor, schedule: Schedule, kernel: Kernel) -> Tensor:
        """Return total noise after a number of forward steps.

        Total noise is that of the schedule, limited to 30. After the last step it is 30 if the kernel has a mask state,
        otherwise at least 12, so that the row is close to the prior under any schedule.

        Args:
            step: Number of steps, from 0 (clean) to ``steps`` (noise), int64 [b].
            schedule: Total noise as a function of time.
            kernel: The kernel that noises each token.

        Returns:
            Total noise, float32 [b].
        """
        t = (step / self.config.steps).float()
        inner = schedule.sigma(t.clamp(min=1e-9)).clamp(max=END)
        last = inner.clamp(min=END_OF_MODES if kernel.mask is None else END)
        return torch.where(step == 0, 0.0, torch.where(step == self.config.steps, last, inner))

    def draw(self, request: DrawRequest) -> Draw:
        steps = self.config.steps
        if request.t is None:
            step = (uniform(self.config.times, request.batch, request.random).double() * steps).long() + 1
        else:
            step = (request.t.double() * steps).round().long().clamp(1, steps)
        sigma = self.levels(step, request.schedule, request.kernel)
        t = (step / steps).float()
        return Draw(request.noised(sigma), t, sigma, torch.ones_like(sigma), torch.full_like(t, float(steps)))

    def loss(
        self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel, schedule: Schedule
    ) -> Tensor:
        below, clean = self.below(draw, kernel, schedule), torch.zeros_like(draw.sigma)
        one = torch.nn.functional.one_hot(batch.tokens, kernel.states).to(draw.sigma.dtype)
        true = kernel.posterior(one, draw.xt, draw.sigma, below)
        predicted = lower_posterior(outputs, draw, kernel, below)
        loss = draw.weight * counted(divergence(true, predicted), batch)
        if self.config.auxiliary > 0:
            x0 = take(lower_posterior(outputs, draw, kernel, clean), batch.tokens)
            loss = loss - self.config.auxiliary * draw.weight * counted(x0.clamp(min=tiny(x0)).log(), batch)
        return loss


def divergence(true: Tensor, predicted: Tensor) -> Tensor:
    """Return the KL divergence KL(true || predicted), computed as a sum of non-negative terms.

    Args:
        true: Probabilities, [..., n].
        predicted: Probabilities, [..., n].

    Returns:
        Nats, [...].
    """
    # sums of the logarithms alone would be mere rounding where both are nearly certain of one state
    terms = torch.xlogy(true, true) - true * predicted.clamp(min=tiny(predicted)).log() - true + predicted
    return terms.sum(-1)
