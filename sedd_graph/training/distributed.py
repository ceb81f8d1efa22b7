"""Process group of a training run: one process, or the processes that torchrun started (torch.distributed)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

__all__ = ["Agreed", "Agreement", "World", "is_broken", "local"]


@dataclasses.dataclass(frozen=True)
class World:
    """Process group of a training run: this process's rank, and collective operations (no-ops for one process)."""

    rank: int = 0
    """Rank of this process, in [0, size)."""
    size: int = 1
    """Number of processes in the group."""
    device: torch.device | str = "cpu"
    """Device of the tensors that :meth:`sum_` communicates."""
    joined: bool = False
    """Whether torch.distributed is in use, as it is under torchrun even for one process."""

    @classmethod
    def single(cls) -> World:
        """Return the group of one process, without torch.distributed."""
        return cls()

    @classmethod
    def from_environment(cls, device: torch.device) -> World:
        """Join the process group that ``torchrun`` started, or return the group of one process.

        ``torchrun`` sets the environment variables ``RANK`` and ``WORLD_SIZE``.

        Args:
            device: Device of this process. With CUDA, tensors on it are communicated by NCCL; tensors on a CPU always
                by gloo.
        """
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            return cls()
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store, rank, size = next(rendezvous("env://"))
            dist.init_process_group(backend, store=_fresh(store), rank=rank, world_size=size)
        return cls(dist.get_rank(), dist.get_world_size(), device, joined=True)

    def close(self) -> None:
        """Destroy the process group of torch.distributed, if this process joined one."""
        if self.joined and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Block until all processes have called this method."""
        self.any(False)

    def sum_(self, value: Tensor) -> None:
        """Sum the tensor ``value``, of any shape, over all processes, in place (all-reduce)."""
        if self.size > 1:
            dist.all_reduce(value)

    def first(self, value: int) -> int:
        """Return the ``value`` of the process of rank 0 in all processes."""
        return self.gather([value])[0][0]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in any process; the result is the same in all processes."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def gather(self, values: Sequence[int]) -> list[list[int]]:
        """Return the ``values`` of every process, by rank. Their number must be the same in all processes."""
        own = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return [own.tolist()]
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return [each.tolist() for each in every]

    def texts(self, own: str) -> list[str]:
        """Return the text ``own`` of every process, by rank."""
        if self.size == 1:
            return [own]
        every: list[str | None] = [None] * self.size
        dist.all_gather_object(every, own)
        return [text or "" for text in every]


def _fresh(store: Store) -> Store:
    """Return a store in which nothing is left of workers that died before torchrun started this one.

    On one machine without ``--standalone``, torchrun keeps one store for all restarts, where a worker could find the address
    of another that is dead, and wait for it. All workers have one agent there, so the number of restarts is the same for
    all. With several machines, torchrun makes a new store for each rendezvous.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        return PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


@dataclasses.dataclass(frozen=True)
class Agreed:
    """Facts about the run before a step, equal in all processes, from which all of them decide what to do."""

    seconds: float
    """Training time of the process of rank 0, seconds."""
    signal: int = 0
    """Number of a signal that a process has caught; 0 if there is none."""
    late: bool = False
    """Whether a checkpoint is overdue by the clock of a process."""
    writing: bool = False
    """Whether a process is still writing its part of a checkpoint."""


class Agreement:
    """Exchange of :class:`Agreed` between processes: one all-reduce per step, which no process waits for.

    With several processes, the facts are those before the previous step. For one process they are current.

    Args:
        world: The process group.
        seconds: Training time before the first step, seconds, equal in all processes.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self._world, self._sent = world, Agreed(seconds)
        self._facts, self._work = torch.zeros(4, dtype=torch.float64), None

    def send(self, own: Agreed) -> None:
        """Send the facts of this process. All processes must call this method once per step."""
        self._sent = own
        if self._world.size > 1:
            seconds = own.seconds if self._world.rank == 0 else 0.0
            self._facts = torch.tensor([seconds, own.signal, own.late, own.writing], dtype=torch.float64)
            self._work = dist.all_reduce(self._facts, dist.ReduceOp.MAX, async_op=True)

    def receive(self) -> Agreed:
        """Return the facts that were sent last, reduced over all processes."""
        if self._work is None:
            return self._sent
        self._work.wait()
        seconds, signal, late, writing = self._facts.tolist()
        return Agreed(seconds, int(signal), bool(late), bool(writing))


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it, unless the tensor is sharded (DTensor)."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def is_broken(error: BaseException) -> bool:
    """Return whether an exception says that a collective operation failed, since another process or the network did."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in ("/gloo/", "NCCL", "ProcessGroup"))
    )
