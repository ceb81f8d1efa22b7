"""Asynchronous writing of checkpoints: tensors are copied, then written by a thread while training goes on.

Each process writes the tensors, or the shards of tensors, that it holds. When all have written theirs, the process of rank 0
writes the manifest and gives the checkpoint its name, so that a checkpoint appears whole or not at all.

Shards are in the format of torch's distributed checkpoints (``HuggingFaceStorageWriter``): safetensors files whose header has
the place of each shard in its tensor. They are written by safetensors itself, which copies nothing.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import EnvironmentFault
from sedd_graph.store.durable import make_folder, rename, sync_tree
from sedd_graph.store.files import disk_faults, remove, subfolder, write_json
from sedd_graph.store.manifest import BUILT, MANIFEST, Entry, Manifest, entry_of
from sedd_graph.training.checkpoint import METRICS, STATE, State, checkpoints, file_name, hidden, sweep_checkpoints
from sedd_graph.training.distributed import World, local

__all__ = ["CheckpointWriter", "Shard", "write_tensors"]

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys of the header of a safetensors file by which torch's distributed checkpoints find shards."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of each tensor that this process writes: that with index ``index`` of ``count``. ``index`` -1: none."""

    index: int
    count: int


@dataclasses.dataclass
class _Copied:
    """Tensors of one kind, or this process's shards of them, as CPU tensors, with the places of shards."""

    tensors: dict[str, Tensor]
    places: dict[str, list[int]]


def _copied(tensors: Mapping[str, Tensor], shard: Shard) -> _Copied:
    """Copy what this process writes. Tensors that are not sharded are written with the first shard."""
    found = _Copied({}, {})
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
        if own.device.type == "cuda":
            found.tensors[name] = torch.empty_like(own, device="cpu", pin_memory=True).copy_(own, non_blocking=True)
        else:
            found.tensors[name] = own.to("cpu", copy=True).contiguous()
        found.places[name] = place
    return found


def write_tensors(copied: _Copied, path: Path, *, sharded: bool) -> None:
    """Write a file of tensors, or of shards with their places, durably."""
    metadata = None
    if sharded:
        places = {name: {_OFFSETS: place} for name, place in copied.places.items()}
        metadata = {_PLACES: json.dumps(places), "format": "pt"}
    save_tensors(copied.tensors, path, metadata=metadata)


@dataclasses.dataclass
class _Pending:
    """A checkpoint that is being written."""

    part: Path
    state: State
    kinds: tuple[str, ...]
    run: dict[str, Entry]
    """Sizes and hashes of files of the run folder when the checkpoint was begun, by name."""
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None
    thread: threading.Thread | None = None


class CheckpointWriter:
    """Writer of the checkpoints of a run, one at a time.

    Args:
        run: The run folder; checkpoints are in its folder ``checkpoints``.
        world: The process group.
        shard: Part of each tensor that this process writes.
        keep: Number of newest checkpoints that are retained.
    """

    def __init__(self, run: Path, world: World, shard: Shard, *, keep: int) -> None:
        self._run, self._world, self._shard, self._keep = run, world, shard, keep
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been begun and not finished."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this process is still writing."""
        pending = self._pending
        return pending is not None and pending.thread is not None and pending.thread.is_alive()

    def begin(self, kinds: Mapping[str, Mapping[str, Tensor]], state: State) -> None:
        """Copy tensors and begin to write a checkpoint. All processes must call this method.

        A checkpoint that was begun before is finished first.

        Args:
            kinds: For each kind of tensors, tensors by name.
            state: Content of ``state.json``.

        Raises:
            EnvironmentFault: The disk is full or cannot be written.
            UserError: ``checkpoints`` is a link out of the run folder (:func:`sedd_graph.store.files.subfolder`).
        """
        self.finish()
        folder = subfolder(self._run, "checkpoints")
        token = self._world.first(secrets.randbits(32))
        part = folder / f".step-{state.step:08d}.{token:08x}.part"
        shard, run = self._shard, {}
        if self._world.rank == 0:
            run = {n: entry_of(p) for n, p in ((n, self._run / n) for n in (*BUILT, METRICS)) if p.is_file()}
        copied = {} if shard.index < 0 else {kind: _copied(tensors, shard) for kind, tensors in kinds.items()}
        if any(tensor.is_pinned() for kind in copied.values() for tensor in kind.tensors.values()):
            torch.cuda.synchronize()
        pending = _Pending(part, state, tuple(kinds), run)
        pending.thread = threading.Thread(target=self._write, args=(pending, copied), name="checkpoint", daemon=True)
        self._pending = pending
        pending.thread.start()

    def _write(self, pending: _Pending, copied: dict[str, _Copied]) -> None:
        try:
            with disk_faults("a checkpoint", pending.part.parent):
                if copied:
                    make_folder(pending.part)
                for kind in tuple(copied):
                    path = pending.part / file_name(kind, self._shard.index, self._shard.count)
                    write_tensors(copied.pop(kind), path, sharded=self._shard.count > 1)
                    pending.entries[kind] = entry_of(path)
        except BaseException as error:  # raised again by finish()
            pending.error = error

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is whole, and delete all but the newest. All processes must call this.

        Raises:
            EnvironmentFault: The disk is full or cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.thread is None:
            return
        pending.thread.join()
        if self._world.any(pending.error is not None):
            if pending.error is not None:
                remove(pending.part)
                raise pending.error
            raise EnvironmentFault(f"another process could not write its part of a checkpoint to {pending.part.parent}")
        own = [_numbers(pending.entries[kind]) if pending.entries else [0, 0, 0] for kind in pending.kinds]
        every = self._world.gather([self._shard.index, *(number for entry in own for number in entry)])
        if self._world.rank == 0:
            files = {}
            for index, *rest in every:
                for at, kind in enumerate(pending.kinds):
                    if index >= 0:
                        files[file_name(kind, index, self._shard.count)] = _entry(rest[3 * at : 3 * at + 3])
            self._publish(pending, files)

    def _publish(self, pending: _Pending, files: dict[str, Entry]) -> None:
        """Write the manifest, give the checkpoint its name, and delete old ones."""
        part, folder = pending.part, pending.part.parent
        final = folder / f"step-{pending.state.step:08d}"
        with disk_faults("a checkpoint", folder):
            try:
                write_json(part / STATE, pending.state.model_dump(mode="json"))
                manifest = Manifest(files={**files, STATE: entry_of(part / STATE)}, run=pending.run)
                write_json(part / MANIFEST, manifest.model_dump(mode="json"))
                sync_tree(part)
                if final.exists():  # something else under this name: a checkpoint from which this run has not started
                    rename(final, hidden(final))
                rename(part, final)
                for old in checkpoints(folder)[: -self._keep]:
                    rename(old, hidden(old))  # so that a kill leaves no half checkpoint under a checkpoint's name
            finally:
                remove(part)
                sweep_checkpoints(folder)


def _numbers(entry: Entry) -> list[int]:
    """Return an entry of a manifest as three signed 64-bit integers."""
    raw = bytes.fromhex(entry.xxh3_128)
    return [entry.bytes, *(int.from_bytes(half, "big", signed=True) for half in (raw[:8], raw[8:]))]


def _entry(numbers: list[int]) -> Entry:
    """Return the entry of which :func:`_numbers` returned the numbers."""
    raw = b"".join(number.to_bytes(8, "big", signed=True) for number in numbers[1:])
    return Entry(bytes=numbers[0], xxh3_128=raw.hex())
