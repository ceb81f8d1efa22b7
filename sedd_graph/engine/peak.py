"""Largest memory of the tensors that a piece of code makes: counted operation by operation, or as its allocator gave it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["PeakMemory", "allocated_peak"]

T = TypeVar("T")


def allocated_peak(work: Callable[[], T], device: torch.device) -> tuple[int | None, T]:
    """Return the largest memory that the allocator of a device gave out during ``work``, bytes, and the result of ``work``.

    What was allocated before is not counted. Compiled code is measured too, unlike by :class:`PeakMemory`.

    Args:
        work: The piece of code.
        device: The device; the memory is None (not known) if it is neither a CPU nor a CUDA GPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    if device.type != "cpu":
        return None, work()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print two lines
    with profile(use_kineto=True, profile_memory=True) as found:
        result = work()
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, result


class PeakMemory(TorchDispatchMode):
    """Mode that records the largest number of bytes of all storages alive at one time, of tensors made within it.

    Tensors that autograd has saved for backward are counted. Kernels that a compiler has written are not operations: what
    they allocate within is not counted.

    Args:
        own: Tensors whose storages are not counted.

    Attributes:
        peak: Largest number of bytes so far.
    """

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in own}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = self.peak = 0

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._own or key in self._alive:  # the reference keeps the address from being used again
            return
        self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self._bytes += storage.nbytes()
        if self._bytes > self.peak:
            self._sweep()
            self.peak = max(self.peak, self._bytes)

    def _sweep(self) -> None:
        """Forget the storages that have been freed."""
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self._bytes = sum(size for _, size in self._alive.values())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result
