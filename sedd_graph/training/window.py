"""Sums of the training loss between two of its records, which a checkpoint stores."""

from __future__ import annotations

import torch
from torch import Tensor

from sedd_graph.training.checkpoint import Window
from sedd_graph.training.distributed import World

__all__ = ["RunningLoss"]


class RunningLoss:
    """Loss of this process since the last record, and the step and time of that record.

    Args:
        device: Device of the sums.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)
        """Nats, and the number of tokens or coordinates that they are of, summed over this process's rows, [2]."""
        self.logged, self.logged_at = 0, 0.0

    def add(self, nats: Tensor, counted: Tensor) -> None:
        """Add the loss of a step, nats, and the number of tokens that it is of (scalar tensors)."""
        self.sums += torch.stack([nats, counted]).double()

    def take(self, world: World, step: int, seconds: float) -> tuple[float, int, float]:
        """Return the mean loss of all processes since the last record, and begin again.

        Args:
            world: The process group, all of whose processes must call this method.
            step: The current step.
            seconds: Training time, seconds.

        Returns:
            The mean loss, nats per token; the number of steps; and their training time, seconds.
        """
        world.sum_(self.sums)
        loss, steps, passed = (self.sums[0] / self.sums[1]).item(), step - self.logged, seconds - self.logged_at
        self.sums.zero_()
        self.logged, self.logged_at = step, seconds
        return loss, steps, passed

    def state(self, world: World) -> Window:
        """Return the sums of each process for a checkpoint. All processes must call this method."""
        every = torch.zeros(2, world.size, device=self.sums.device, dtype=torch.float64)
        every[:, world.rank] = self.sums
        world.sum_(every)
        nats, counted = every.tolist()
        return Window.model_construct(nats=nats, counted=counted, logged=self.logged, logged_at=self.logged_at)

    def load(self, state: Window, world: World) -> None:
        """Continue from a checkpoint. If it is of another number of processes, rank 0 continues with the sum of all."""
        sums = torch.tensor([state.nats, state.counted], dtype=torch.float64)
        if sums.shape[1] == world.size:
            self.sums.copy_(sums[:, world.rank])
        else:
            self.sums.copy_(sums.sum(1) if world.rank == 0 else torch.zeros(2))
        self.logged, self.logged_at = state.logged, state.logged_at
