"""Asynchronous writing of checkpoints: a thread copies and writes tensors while training goes on.

Each process writes the tensors, or the shards of tensors, that it holds. When all have written theirs, a thread of the process
of rank 0 writes the manifest and gives the checkpoint its name, so that a checkpoint appears whole or not at all.

Shards are in the format of torch's distributed checkpoints (``HuggingFaceStorageWriter``): safetensors files whose header has
the place of each shard in its tensor. They are written by safetensors itself, which copies nothing.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import secrets
import threading
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from torch import Tensor

from sedd_graph.engine.weights import save_tensors
from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.store.durable import make_folder, rename, sync_file, sync_tree
from sedd_graph.store.files import disk_faults, remove, subfolder, write_json
from sedd_graph.store.manifest import BUILT, MANIFEST, Entry, Manifest, entry_of
from sedd_graph.training.checkpoint import METRICS, STATE, State, checkpoints, file_name, hidden, sweep_checkpoints
from sedd_graph.training.distributed import World
from sedd_graph.training.staging import Copied, Shard, Staging, Transfer

__all__ = ["CheckpointWriter", "write_tensors"]

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys of the header of a safetensors file by which torch's distributed checkpoints find shards."""


def write_tensors(copied: Copied, path: Path, *, sharded: bool) -> None:
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
    transfer: Transfer | None
    """Copying of the tensors; None once the training loop has waited for it."""
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    error: BaseException | None = None
    """Exception of the thread."""
    refused: UserError | None = None
    """Why the copies cannot be used."""
    thread: threading.Thread | None = None
    written: bool = False
    """Whether all processes have written their parts."""

    def start(self, work: Callable[[], None]) -> None:
        """Run a function in a thread; :attr:`error` becomes its exception."""

        def run() -> None:
            try:
                with disk_faults("a checkpoint", self.part.parent):
                    work()
            except BaseException as error:  # raised again by the training loop
                self.error = error

        # with what the context of the training loop allows, such as a link out of the run folder
        context = contextvars.copy_context()
        self.thread = threading.Thread(target=context.run, args=(run,), name="checkpoint", daemon=True)
        self.thread.start()


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
        self._staging = Staging()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been begun and not finished."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether a thread of this process is still at work."""
        pending = self._pending
        return pending is not None and pending.thread is not None and pending.thread.is_alive()

    def begin(self, kinds: Mapping[str, Mapping[str, Tensor]], state: State, *, at_once: Container[str] = ()) -> None:
        """Begin to copy tensors and to write a checkpoint. All processes must call this method.

        Until :meth:`wait_for_copy` has been called, nothing but a forward and a backward pass may run. A checkpoint that
        was begun before is finished first.

        Args:
            kinds: For each kind of tensors, tensors by name.
            state: Content of ``state.json``.
            at_once: Names of tensors that a forward pass may change; they are copied before this method returns.

        Raises:
            EnvironmentFault: The disk is full or cannot be written.
            UserError: ``checkpoints`` is a link out of the run folder (:func:`sedd_graph.store.files.subfolder`).
        """
        self.finish()
        folder = subfolder(self._run, "checkpoints")
        token = self._world.first(secrets.randbits(32))
        part = folder / f".step-{state.step:08d}.{token:08x}.part"
        run = dict[str, Entry]()
        if self._world.rank == 0:
            run = {n: entry_of(p) for n, p in ((n, self._run / n) for n in (*BUILT, METRICS)) if p.is_file()}
        transfer = self._staging.begin(kinds, self._shard, at_once=at_once)
        pending = self._pending = _Pending(part, state, tuple(kinds), run, transfer)
        pending.start(lambda: self._write(pending, transfer))

    def _write(self, pending: _Pending, transfer: Transfer) -> None:
        transfer.copy()
        if transfer.kinds:
            make_folder(pending.part)
        for kind, copied in transfer.kinds.items():
            path = pending.part / file_name(kind, self._shard.index, self._shard.count)
            write_tensors(copied, path, sharded=self._shard.count > 1)
            pending.entries[kind] = entry_of(path)

    def wait_for_copy(self) -> None:
        """Wait until the tensors are copied, on a GPU without the host. To be called before they are changed."""
        pending = self._pending
        if pending is None or pending.transfer is None:
            return
        changed, pending.transfer = pending.transfer.wait(), None
        if changed is not None:  # raised when the checkpoint would be published, by all processes
            text = f"the forward pass has changed {changed!r} while a checkpoint was made: a component may change only "
            pending.refused = UserError(f"{text}its buffers, and its parameters of less than 1 MiB")

    def advance(self) -> None:
        """Take the next step to a whole checkpoint, if no thread is at work in any process. All processes must call this.

        The first call, once all have written, begins to publish the checkpoint; the second one ends it.

        Raises:
            EnvironmentFault: The disk is full or cannot be written.
            UserError: The forward pass has changed weights while they were copied.
        """
        pending = self._pending
        if pending is None or pending.thread is None:
            return
        pending.thread.join()
        self._require(pending)
        if pending.written:
            self._pending = None
            return
        pending.written = True
        own = [_numbers(pending.entries[kind]) if pending.entries else [0, 0, 0] for kind in pending.kinds]
        every = self._world.gather([self._shard.index, *(number for entry in own for number in entry)])
        if self._world.rank == 0:
            files = {}
            for index, *rest in every:
                for at, kind in enumerate(pending.kinds):
                    if index >= 0:
                        files[file_name(kind, index, self._shard.count)] = _entry(rest[3 * at : 3 * at + 3])
            pending.start(lambda: self._publish(pending, files))

    def _require(self, pending: _Pending) -> None:
        """Raise the error of a checkpoint, in all processes if one has an error."""
        error = pending.error or pending.refused
        if self._world.any(error is not None):
            self._pending = None
            if error is not None:
                remove(pending.part)
                raise error
            raise EnvironmentFault(f"another process could not write its part of a checkpoint to {pending.part.parent}")

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is whole, and old ones are deleted. All processes must call this.

        Raises:
            EnvironmentFault: The disk is full or cannot be written.
            UserError: The forward pass has changed weights while they were copied.
        """
        self.wait_for_copy()
        while self._pending is not None:
            self.advance()

    def close(self) -> None:
        """Free the memory of copies. No checkpoint may be pending."""
        self._staging.free()

    def _publish(self, pending: _Pending, files: dict[str, Entry]) -> None:
        """Write the manifest, give the checkpoint its name, and delete old ones."""
        part, folder = pending.part, pending.part.parent
        final = folder / f"step-{pending.state.step:08d}"
        try:
            write_json(part / STATE, pending.state.model_dump(mode="json"))
            manifest = Manifest(files={**files, STATE: entry_of(part / STATE)}, run=pending.run)
            write_json(part / MANIFEST, manifest.model_dump(mode="json"))
            sync_tree(part)
            if (self._run / METRICS).is_file():
                sync_file(self._run / METRICS)  # of which the manifest has a hash
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
