"""The loss of a process on token rows at a few positions of each row.

Axes: g groups of positions of one row, m positions of a group.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sedd_graph.diffusion.batch import Batch, Draw
from sedd_graph.diffusion.numerics import full_precision
from sedd_graph.diffusion.schedule import Schedule
from sedd_graph.diffusion.tokens.kernel import Kernel
from sedd_graph.diffusion.tokens.objective import Objective

__all__ = ["PositionTerms"]


class PositionTerms(nn.Module):
    """Sum over the positions of a group of the loss of an objective.

    Args:
        kernel: The kernel that noises each token.
        schedule: Total noise as a function of time.
        objective: The objective, one whose loss is a sum over positions (:attr:`Objective.sums_positions`).
        use: ``reconstruction`` for :meth:`Objective.reconstruction`; otherwise :meth:`Objective.loss`.
    """

    def __init__(self, kernel: Kernel, schedule: Schedule, objective: Objective, use: str) -> None:
        super().__init__()
        self.kernel, self.schedule, self.objective = kernel, schedule, objective
        self.method = "reconstruction" if use == "reconstruction" else "loss"

    def forward(self, outputs: Mapping[str, Tensor], draw: Draw, batch: Batch) -> Tensor:
        """Return the loss of each group, nats, [g].

        Args:
            outputs: The network's outputs by name, [g, m, ...].
            draw: Noisy tokens and noise levels of the groups.
            batch: Clean tokens of the groups; padding is not in the loss.
        """
        with full_precision(draw.xt):
            read = self.kernel.translate(outputs, draw.xt, draw.sigma)
            nats: Tensor = getattr(self.objective, self.method)(read, draw, batch, self.kernel, self.schedule)
            return nats
