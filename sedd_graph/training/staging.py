"""Copies, in host memory, of the tensors of a checkpoint: those of one step, made while the next step begins.

Weights, averages and optimizer states change only when the optimizer steps. So a thread copies them while the forward and
backward pass of the next step run, and only the optimizer waits for the copy. Buffers and small parameters, which a forward
pass may change, are copied at once. The copies are views of one block of host memory per kind of tensors, which the next
checkpoint uses again: no memory is allocated while training runs, and on a GPU the blocks are page-locked.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from sedd_graph.training.distributed import local

__all__ = ["Copied", "Shard", "Staging", "Transfer"]

_ALIGNED = 64
"""Copies start at multiples of this number of bytes."""
_SMALL = 2**20
"""Tensors of fewer bytes are copied at once."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of each tensor that this process writes: that with index ``index`` of ``count``. ``index`` -1: none."""

    index: int
    count: int


@dataclasses.dataclass
class Copied:
    """Tensors of one kind, or this process's shards of them, as CPU tensors, with the places of shards."""

    tensors: dict[str, Tensor]
    places: dict[str, list[int]]


@dataclasses.dataclass
class _Part:
    """A tensor, or this process's part of it, and its copy."""

    name: str
    source: Tensor
    copy: Tensor
    version: int
    """Number of in-place changes of ``source`` when the transfer began."""


class Transfer:
    """Copying of the tensors of one checkpoint: :meth:`copy` runs in a thread, :meth:`wait` in that of the training loop.

    Args:
        kinds: For each kind the copies, whose values are there when :meth:`copy` has returned.
        parts: Tensors that are not copied yet.
        stream: On a GPU, the stream of the copies.
    """

    def __init__(self, kinds: dict[str, Copied], parts: list[_Part], stream: Any) -> None:
        self.kinds, self._parts, self._stream = kinds, parts, stream
        self._issued, self._event = threading.Event(), None

    def copy(self) -> None:
        """Copy the tensors, and return when all copies are whole."""
        try:
            if self._stream is None:
                for part in self._parts:
                    _copy_bytes(part.source, part.copy)
                return
            with torch.cuda.stream(self._stream):
                for part in self._parts:
                    part.copy.copy_(part.source, non_blocking=True)
                event: Any = torch.cuda.Event()
                event.record(self._stream)
            self._event = event
            self._issued.set()
            event.synchronize()
        finally:
            self._issued.set()

    def wait(self) -> str | None:
        """Let what follows wait until the tensors are copied; to be called before the optimizer changes them.

        On a GPU its work waits, and not the host.

        Returns:
            Name of a tensor that was changed in the meantime, by a component in the forward pass, so that the copies may
            be those of two steps; None if all is well.
        """
        self._issued.wait()
        if self._event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._event)
        changed = (part.name for part in self._parts if part.source._version != part.version)
        return next(changed, None)


class Staging:
    """Host memory for the tensors of checkpoints, one checkpoint at a time."""

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}
        self._stream: Any = None

    def begin(
        self, kinds: Mapping[str, Mapping[str, Tensor]], shard: Shard, *, at_once: Container[str] = ()
    ) -> Transfer:
        """Begin to copy what this process writes. Tensors that are not sharded are written with the first shard.

        Args:
            kinds: For each kind of tensors, tensors by name.
            shard: Part of each tensor that this process writes.
            at_once: Names of tensors that more than the optimizer changes.
        """
        found, later, device = dict[str, Copied](), list[_Part](), torch.device("cpu")
        for kind, tensors in kinds.items() if shard.index >= 0 else ():
            own, places = _parts(tensors, shard)
            copies = self._views(kind, own)
            found[kind] = Copied(copies, places)
            for name, part in own.items():
                device = part.device if part.is_cuda else device
                if name in at_once or part.nbytes < _SMALL:
                    copies[name].copy_(part, non_blocking=True)
                else:
                    later.append(_Part(name, part, copies[name], part._version))
        if device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        return Transfer(found, later, self._stream)

    def free(self) -> None:
        """Free the memory."""
        self._blocks.clear()

    def _views(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return uninitialised CPU tensors of the shapes and dtypes of ``tensors``, in the block of a kind."""
        starts, total = {}, 0
        for name, tensor in tensors.items():
            starts[name] = total
            total += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        block = self._blocks.get(kind)
        if block is None or len(block) != total:
            self._blocks.pop(kind, None)
            block = self._blocks[kind] = torch.empty(total, dtype=torch.uint8)
            if any(tensor.is_cuda for tensor in tensors.values()):
                _lock_pages(block)
        return {
            name: block[start : start + tensors[name].nbytes].view(tensors[name].dtype).view(tensors[name].shape)
            for name, start in starts.items()
        }


def _parts(tensors: Mapping[str, Tensor], shard: Shard) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return what this process writes of tensors by name, without copying it, and the places of its first elements."""
    found, places = dict[str, Tensor](), dict[str, list[int]]()
    for name, tensor in tensors.items():
        own, place = tensor.detach(), [0] * tensor.dim()
        if hasattr(own, "__create_chunk_list__"):  # a DTensor
            chunks = own.__create_chunk_list__()
            own = local(own)
            if not own.numel() and shard.index:
                continue  # fewer rows than processes
            place = list(chunks[0].offsets) if own.numel() else place
        elif shard.index:
            continue
        found[name], places[name] = own, place
    return found, places


def _copy_bytes(source: Tensor, copy: Tensor) -> None:
    """Copy a CPU tensor in this thread alone: torch would start threads that compete with those of training."""
    if not source.is_contiguous():
        copy.copy_(source)
        return
    to, of = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (copy, source))
    to[:] = of


def _lock_pages(block: Tensor) -> None:
    """Page-lock a block of memory until it is freed, so that a GPU copies to it without the host.

    torch's own allocator of page-locked memory would round the size up to a power of two.
    """
    cudart: Any = torch.cuda.cudart()
    if block.nbytes and int(cudart.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
        weakref.finalize(block, cudart.cudaHostUnregister, block.data_ptr())
