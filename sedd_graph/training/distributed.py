"""The processes of a run: one, or those that torchrun started, connected by torch.distributed."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World"]


@dataclasses.dataclass(frozen=True)
class World:
    """Rank of this process among the processes of a run, and collective operations. All are no-ops for one process."""

    rank: int = 0
    """Rank of this process, from 0."""
    size: int = 1
    """Number of processes."""
    device: torch.device | str = "cpu"
    """Device of the tensors in collective operations."""

    @classmethod
    def single(cls) -> World:
        """Return a world of one process."""
        return cls()

    @classmethod
    def from_environment(cls, device: torch.device) -> World:
        """Join the process group that ``torchrun`` started (``WORLD_SIZE`` above 1), or return a world of one process."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), size, device)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, value: Tensor) -> None:
        """Sum ``value`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process, so that all leave the loop at the same step."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)
