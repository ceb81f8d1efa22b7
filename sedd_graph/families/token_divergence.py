"""Predictions of networks on token rows, and their divergences, evaluated where noise has changed a token.

Networks are evaluated up to their position-wise end. The end, the prediction of the student and its divergence from that of the
teacher are then evaluated on a few positions at a time (:mod:`sedd_graph.engine.tail`), so that nothing of the size of the
vocabulary is kept.

Axes: b batch, l length, g groups of positions of one row, m positions of a group, n states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.distillation import LEAST, UNLIKELY, Direction
from sedd_graph.diffusion.numerics import full_precision, tiny
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import lower_posterior
from sedd_graph.diffusion.tokens.stage import Stage
from sedd_graph.engine.regions import Model
from sedd_graph.engine.split import Split

__all__ = ["Compared", "Divergence", "Evaluated", "predicted"]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A network that has been evaluated on noisy rows, up to its position-wise end.

    Attributes:
        stage: What the outputs are computed from where they are read.
        model: Module of the network; None where outputs were given.
        parts: The network as a trunk and an end; None if it has no such end.
    """

    stage: Stage
    model: Model | None = None
    parts: Split | None = None


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a student's outputs at groups of positions are compared with.

    Attributes:
        upper: Noisy rows x_t, g of m positions.
        lower: Noisy rows x_s.
        below: Total noise of the state whose distributions are compared, [g].
        teacher: Outputs of the teacher at x_s by name, [g, m, n], without gradient.
    """

    upper: Draw
    lower: Draw
    below: Tensor
    teacher: Mapping[str, Tensor]


class Divergence(nn.Module):
    """Divergence of a student's prediction from the teacher's, of rows of a few positions.

    Args:
        kernel: The kernel.
        direction: Which divergence.
    """

    def __init__(self, kernel: Kernel, direction: Direction) -> None:
        super().__init__()
        self.kernel, self.forwards = kernel, direction == "forward"

    def forward(self, outputs: Mapping[str, Tensor], draw: Compared, batch: Batch) -> Tensor:
        """Return nats of each row, weighted by 1 / (probability that noise has changed a token), float32 [g].

        Args:
            outputs: Outputs of the student at x_t by name, [g, m, n].
            draw: What they are compared with.
            batch: The clean rows; positions outside of ``loss`` do not count.
        """
        upper, lower = draw.upper, draw.lower
        with full_precision(upper.xt):
            q = predicted(self.kernel, outputs, upper.xt, upper.sigma, draw.below)
            p = predicted(self.kernel, draw.teacher, lower.xt, lower.sigma, draw.below).detach()
            log_q, log_p = q.clamp(min=LEAST).log(), p.clamp(min=LEAST if self.forwards else UNLIKELY).log()
            kl = (p * (log_p - log_q) if self.forwards else q * (log_q - log_p)).sum(-1)
            # reverse: where noise has changed a token after s, the teacher sees what the student must predict
            counts = batch.loss if self.forwards else batch.loss & (lower.xt == upper.xt)
            return torch.where(counts, kl, 0.0).sum(-1) / -torch.expm1(-upper.sigma)


def predicted(kernel: Kernel, outputs: Mapping[str, Tensor], x: Tensor, sigma: Tensor, below: Tensor) -> Tensor:
    """Return the predicted probabilities of the state at a lower noise level, float32 [g, m, n].

    Args:
        kernel: The kernel.
        outputs: Outputs of a network by name, [g, m, n].
        x: The noisy tokens that the network saw, int64 [g, m].
        sigma: Their total noise, [g].
        below: The lower total noise, [g]; 0 for the clean token.
    """
    found = kernel.translate({name: value.float() for name, value in outputs.items()}, x, sigma)
    law = lower_posterior(found, Draw(x, sigma, sigma, sigma, sigma), kernel, below).clamp(min=0)
    # a network may give log-probabilities up to a constant
    return law / law.sum(-1, keepdim=True).clamp(min=tiny(law))
