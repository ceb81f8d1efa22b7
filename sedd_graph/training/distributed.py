"""The processes of a run: one, or those that torchrun started, joined by torch.distributed."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["World"]


@dataclasses.dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size``. With one process every method is a no-op."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def single(cls) -> World:
        """Return a world of one process."""
        return cls()

    @classmethod
    def from_environment(cls, device: torch.device) -> World:
        """Join the processes that ``torchrun`` started (``RANK`` and ``WORLD_SIZE`` set), or return a world of one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), size, device)

    def close(self) -> None:
        """Leave the group of processes."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def sum_(self, value: Tensor) -> None:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process, so that all leave the loop at the same step."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)
