"""Running sums of the training loss since its last log record, which a checkpoint stores."""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.training.checkpoint import Window
from sedd_graph.training.distributed import World

__all__ = ["RunningLoss"]


class RunningLoss:
    """Training loss of this process, summed since the last log record, and the step and training time of that record.

    Args:
        device: Device of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)
        """Nats, and the number of tokens or coordinates that they are of, summed over this process's rows, [2]."""
        self.logged, self.logged_at = 0, 0.0

    def add(self, nats: Tensor, counted: Tensor) -> None:
        """Add the loss of a step.

        Args:
            nats: Loss summed over this process's rows, nats, scalar tensor.
            counted: Number of tokens, or of coordinates of points, whose loss is in ``nats``, scalar tensor.
        """
        self.sums += torch.stack([nats, counted]).double()

    def take(self, world: World, step: int, seconds: float) -> tuple[float, int, float]:
        """Return the mean loss of all processes since the last log record, and reset the sums.

        Args:
            world: The process group, all of whose processes must call this method.
            step: The current step.
            seconds: Training time, seconds.

        Returns:
            The mean loss per token (or per coordinate of points); the number of steps; and their training time,
            seconds.
        """
        world.sum_(self.sums)
        loss, steps, passed = (self.sums[0] / self.sums[1]).item(), step - self.logged, seconds - self.logged_at
        self.sums.zero_()
        self.logged, self.logged_at = step, seconds
        return loss, steps, passed

    def state(self, world: World) -> Window:
        """Return the sums of every process, as a checkpoint stores them. All processes must call this method."""
        every = torch.zeros(2, world.size, device=self.sums.device, dtype=torch.float64)
        every[:, world.rank] = self.sums
        world.sum_(every)
        nats, counted = every.tolist()
        return Window.model_construct(nats=nats, counted=counted, logged=self.logged, logged_at=self.logged_at)

    def load(self, state: Window, world: World) -> None:
        """Restore the sums from a checkpoint.

        Args:
            state: The sums of each process. If their number is not that of the present processes, rank 0 continues with
                their total, and the other ranks with 0.
            world: The process group.
        """
        sums = torch.tensor([state.nats, state.counted], dtype=torch.float64)
        if sums.shape[1] == world.size:
            self.sums.copy_(sums[:, world.rank])
        else:
            self.sums.copy_(sums.sum(1) if world.rank == 0 else torch.zeros(2))
        self.logged, self.logged_at = state.logged, state.logged_at
