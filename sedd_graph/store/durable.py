"""Writes that survive a power cut: files and folders are flushed to the disk (fsync) before they count as written.

A rename is atomic for readers, but after a power cut a file system may hold the new name with an empty file, or the old
name. So a file is flushed before it is renamed, and its folder after.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

__all__ = [
    "METADATA",
    "DeferringStore",
    "DurableStore",
    "make_folder",
    "publish",
    "rename",
    "sync_file",
    "sync_folder",
    "sync_tree",
]

METADATA = "zarr.json"
"""File name of the metadata of a zarr group or array."""
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk; do nothing where the system cannot flush folders."""
    if os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush files only
            raise
    finally:
        os.close(number)


def sync_tree(path: Path) -> None:
    """Flush a folder to the disk, with all files and folders in it."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and flush their names to the disk. The folder may exist."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder within its folder, and flush the names to the disk."""
    source.replace(target)
    sync_folder(target.parent)


def publish(part: Path, names: Iterable[Path]) -> Path:
    """Flush a folder to the disk, with all in it, then rename it to the first of ``names`` that is free.

    Args:
        part: The folder.
        names: Paths beside it. One that another process takes in the meantime is passed over, too.

    Returns:
        The new path of the folder.

    Raises:
        FileExistsError: All names are taken. The folder is left under its own name.
    """
    sync_tree(part)
    for path in names:
        if path.exists():
            continue
        try:
            part.rename(path)
        except OSError as error:
            if error.errno in _TAKEN:
                continue
            raise
        sync_folder(path.parent)
        return path
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(part))


class DurableStore(LocalStore):
    """Local zarr store whose chunks and metadata are on the disk when a write returns, in the order of the writes."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write ``value`` under ``key``, atomically and durably."""
        self._check_writable()
        await asyncio.to_thread(self._write, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write ``value`` under ``key``, atomically and durably, unless the key exists."""
        if not await self.exists(key):
            await self.set(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write ``value`` under ``key``, atomically and durably, without an event loop."""
        self._check_writable()
        self._write(key, value)

    def _write(self, key: str, value: Buffer) -> None:
        path = self.root / key
        make_folder(path.parent)
        self._put(path, value, flush=True)
        sync_folder(path.parent)

    def _put(self, path: Path, value: Buffer, *, flush: bool) -> None:
        """Write a file atomically; with ``flush``, its content is on the disk before it has its name."""
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")  # zarr's own suffix
        try:
            with part.open("wb") as stream:
                stream.write(value.as_buffer_like())
                if flush:
                    stream.flush()
                    os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class DeferringStore(DurableStore):
    """Local zarr store in which the new chunks of some arrays are on the disk only when :meth:`flush` returns.

    All else, such as metadata and chunks that replace flushed ones, is on the disk when a write returns, so that no power
    cut takes what has been flushed.

    Args:
        root: The folder of the store.
        read_only: True to refuse writes.
        array: Name of the arrays, in any group of the store.
    """

    def __init__(self, root: Path | str, *, read_only: bool = False, array: str = "value") -> None:
        super().__init__(root, read_only=read_only)
        self._array = array
        self._unflushed = set[Path]()
        self._lock = threading.Lock()

    def _write(self, key: str, value: Buffer) -> None:
        path = self.root / key
        with self._lock:
            flushed = path.exists() and path not in self._unflushed
            if flushed or path.name == METADATA or f"/{self._array}/c/" not in f"/{key}":
                super()._write(key, value)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._put(path, value, flush=False)
            self._unflushed.add(path)

    def flush(self) -> None:
        """Flush the chunks written so far to the disk, with the names of their folders."""
        with self._lock:
            for path in self._unflushed:
                sync_file(path)
            top = self.root.parent  # zarr creates the root without flushing its name
            folders = {folder for path in self._unflushed for folder in path.parents if folder.is_relative_to(top)}
            for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
                sync_folder(folder)
            self._unflushed.clear()
