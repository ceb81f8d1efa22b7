"""Process group of a training run: one process, or the processes that torchrun started (torch.distributed)."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World"]


@dataclasses.dataclass(frozen=True)
class World:
    """Process group of a training run: this process's rank, and collective operations (no-ops for one process)."""

    rank: int = 0
    """Rank of this process, in [0, size)."""
    size: int = 1
    """Number of processes in the group."""
    device: torch.device | str = "cpu"
    """Device of the tensors that collective operations communicate."""

    @classmethod
    def single(cls) -> World:
        """Return the group of one process, without torch.distributed."""
        return cls()

    @classmethod
    def from_environment(cls, device: torch.device) -> World:
        """Join the process group that ``torchrun`` started, or return the group of one process.

        The environment variable ``WORLD_SIZE`` is above 1 under ``torchrun`` with several processes.

        Args:
            device: Device of this process; CUDA selects the NCCL backend, any other device gloo.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), size, device)

    def close(self) -> None:
        """Destroy the process group of torch.distributed, if this process joined one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Block until all processes have called this method."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, value: Tensor) -> None:
        """Sum the tensor ``value``, of any shape, over all processes, in place (all-reduce)."""
        if self.size > 1:
            dist.all_reduce(value)

    def first(self, value: int) -> int:
        """Return the ``value`` of the process of rank 0 in all processes."""
        found = torch.tensor(value if self.rank == 0 else 0, device=self.device, dtype=torch.int64)
        self.sum_(found)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process; the result is the same in all processes."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)
