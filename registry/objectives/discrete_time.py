"""Objective of diffusion in discrete time (D3PM, arXiv 2107.03006), for any kernel.

Axes: b batch, l length, n states.
"""

import math
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
from sedd_graph.errors import UserError

from .bounds import Times, counted, uniform

__all__ = ["D3PM"]

END = 30.0
"""Total noise at the last step, for kernels with a mask: alpha = exp(-30), so the prior term of the bound is
negligible."""
CLIPPED = 0.999
"""Largest beta of the last step under ``last: clipped``, that of D3PM's code."""
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

    Under a kernel in discrete time, such as ``steps``, T must be its number of steps.
    """

    reads = ("log_x0", "log_score")
    sums_positions = True
    discrete = True

    class Config(ComponentConfig):
        steps: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 1000
        """Number of time steps of the process, from 1 to 1,000,000."""
        auxiliary: Annotated[float, pydantic.Field(ge=0, le=100)] = 0.0
        """Weight of the auxiliary cross-entropy -log p(x_0 | x_t) of each position, from 0 to 100; 0.01 in the paper
        for text."""
        auxiliary_form: Literal["raw", "posterior"] = "raw"
        """Distribution of the auxiliary cross-entropy. ``raw``: the prediction ``log_x0`` itself, as in the paper.
        ``posterior``: the prediction weighted by q(x_t | x_0), which is the model's distribution of the clean token
        given the whole noisy row. A ``log_score`` head makes no prediction, and always has the latter."""
        first: Literal["posterior", "prediction"] = "posterior"
        """Model of the clean token in step 1. ``posterior``: as in all steps, the prediction weighted by q(x_t | x_0)
        (D3PM's code for text). ``prediction``: the prediction ``log_x0`` itself (its code for images)."""
        last: Literal["stationary", "clipped", "schedule"] | None = None
        """Noise of step T. ``stationary``: so much that the row is the prior (D3PM's code for text). ``clipped``: the
        schedule's, with a beta of at most 0.999 (its cosine betas). ``schedule``: the schedule's. null: ``stationary``;
        under a kernel in discrete time ``schedule``, the only value that it takes."""
        prior: bool = True
        """True: unless ``last`` is ``stationary``, the loss includes KL(q(x_T | x_0) || prior), a constant that makes it
        a bound. False: only evaluation does (D3PM's training loss)."""
        times: Times = "low_discrepancy"
        """Distribution of the time steps of a global batch. ``low_discrepancy``: an even grid with one random offset
        (less variance, no bias); ``independent``: independent uniform steps."""

    config: Config

    def bound(self) -> Objective:
        if self.differs() is None:
            return self
        return D3PM(self.config.model_copy(update={"auxiliary": 0.0, "prior": True}), self.context)

    def differs(self) -> str | None:
        reasons = ["the auxiliary cross-entropy is added"] if self.config.auxiliary > 0 else []
        reasons += [] if self.config.prior else ["the divergence from the prior is left out"]
        return " and ".join(reasons) or None

    def off_optimum(self, draw: Draw, kernel: Kernel, schedule: Schedule) -> str | None:
        if kernel.carries_over:  # a visible token is the clean one, and a mask says nothing: both laws are one
            return None
        if self.config.auxiliary > 0 and self.config.auxiliary_form == "raw":
            return "the auxiliary cross-entropy of the raw prediction is least at the posterior given the whole row"
        if self.raw_first and not bool(self.below(draw, kernel, schedule).any()):
            return "step 1, where the prediction itself is the model, is least at the posterior given the whole row"
        return None

    def lacks(self, kernel: Kernel) -> str | None:
        if kernel.steps is not None and kernel.steps != self.config.steps:
            return f"a kernel of {self.config.steps:,} steps, as 'steps' declares"
        if kernel.steps is not None and self.config.last not in (None, "schedule"):
            return f"a kernel in continuous time, for last: {self.config.last}"
        if not self.config.prior or not self._ends_early(kernel):
            return super().lacks(kernel)
        try:
            infinite = bool(kernel.prior_divergence(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)).isinf())
        except UserError:
            return f"a kernel with a known divergence from its prior, for last: {self.config.last}"
        if infinite and kernel.steps is None:
            return (
                f"a kernel whose prior has all tokens, for last: {self.config.last} (the bound is infinite; take last: "
                "stationary, or prior: false to train without that term)"
            )
        return super().lacks(kernel)

    def reads_mask(self, kernel: Kernel) -> bool:
        return kernel.masks_evenly

    def read_positions(self, draw: Draw, batch: Batch, kernel: Kernel) -> Tensor:
        # at a visible token of such a kernel both distributions are that token; the other terms need not be 0 there
        if self.config.auxiliary > 0 or self.raw_first or (self.config.prior and self._ends_early(kernel)):
            return batch.loss & batch.corrupt
        return super().read_positions(draw, batch, kernel)

    @property
    def measure(self) -> Literal["time", "masked", "steps"]:
        return "steps"

    @property
    def raw_first(self) -> bool:
        return self.config.first == "prediction"

    def below(self, draw: Draw, kernel: Kernel, schedule: Schedule) -> Tensor:
        step = (draw.t.double() * self.config.steps).round().long()
        return self.levels(step - 1, schedule, kernel)

    def _ends_early(self, kernel: Kernel) -> bool:
        """Return True if the last step has the noise of schedule or kernel, which may differ from the prior."""
        return kernel.steps is not None or self.config.last in ("clipped", "schedule")

    def levels(self, step: Tensor, schedule: Schedule, kernel: Kernel) -> Tensor:
        """Return total noise after a number of forward steps.

        Total noise is that of the schedule, limited to 30 unless the kernel is one in discrete time. After the last
        step, Config ``last`` determines it; by default it is 30 if the kernel has a mask state, otherwise at least 12,
        so that the row is close to the prior under any schedule.

        Args:
            step: Number of steps, from 0 (clean) to ``steps`` (noise), int64 [b].
            schedule: Total noise as a function of time.
            kernel: The kernel that noises each token.

        Returns:
            Total noise, float32 [b].
        """
        t = (step / self.config.steps).float()
        inner = schedule.sigma(t.clamp(min=1e-9))
        if kernel.steps is not None:
            return torch.where(step == 0, 0.0, inner)
        inner = inner.clamp(max=END)
        if self.config.last == "schedule":
            last = inner
        elif self.config.last == "clipped":
            before = schedule.sigma(((step - 1) / self.config.steps).float().clamp(min=1e-9))
            last = torch.minimum(inner, before - math.log1p(-CLIPPED))
        else:
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
        below = self.below(draw, kernel, schedule)
        one = draw.sigma.new_zeros(*batch.tokens.shape, kernel.states).scatter(-1, batch.tokens[..., None], 1.0)
        true = kernel.posterior(one, draw.xt, draw.sigma, below)
        predicted = lower_posterior(outputs, draw, kernel, below)
        if self.raw_first and "log_x0" in outputs:
            predicted = torch.where((below == 0)[:, None, None], outputs["log_x0"].float().exp(), predicted)
        loss = draw.weight * counted(divergence(true, predicted), batch)
        if self.config.auxiliary > 0:
            loss = loss + self.config.auxiliary * draw.weight * counted(
                self._surprise(outputs, draw, batch, kernel), batch
            )
        if self.config.prior and self._ends_early(kernel):
            loss = loss + self.prior_term(batch, kernel, schedule)
        return loss

    def _surprise(self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch, kernel: Kernel) -> Tensor:
        """Return the auxiliary cross-entropy of each position without its weight, nats, [b, l]."""
        if self.config.auxiliary_form == "raw" and "log_x0" in outputs:
            return -take(outputs["log_x0"].float(), batch.tokens)
        x0 = take(lower_posterior(outputs, draw, kernel, torch.zeros_like(draw.sigma)), batch.tokens)
        return -x0.clamp(min=tiny(x0)).log()

    def prior_term(self, batch: Batch, kernel: Kernel, schedule: Schedule) -> Tensor:
        """Return KL(q(x_T | x_0) || prior) of each row, the term of the bound that no step has.

        Args:
            batch: The clean rows.
            kernel: The kernel that noises each token.
            schedule: Total noise as a function of time.

        Returns:
            Nats, float32 [b].
        """
        last = torch.full((len(batch),), self.config.steps, device=batch.tokens.device)
        nats = kernel.prior_divergence(batch.tokens, self.levels(last, schedule, kernel))
        return counted(nats, batch).float()


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
