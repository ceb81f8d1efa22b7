"""A disk that keeps only what POSIX promises: what was flushed (fsync), file by file and folder by folder.

Files that were never flushed are empty after a power cut, and names that were never flushed are not there.
"""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class StrictDisk:
    """Recorder of what each fsync puts on the disk below a folder.

    Args:
        root: The folder, all of which is on the disk at the start.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.flushed: list[tuple[int, bytes | dict[str, int]]] = []
        """For each fsync the inode, and the content of the file, or the inodes of the names in the folder."""
        self._lock, self._held, self._fsync = threading.Lock(), dict[int, int](), os.fsync
        for folder, _, files in os.walk(root):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                self._record(os.open(path, os.O_RDONLY))

    def _record(self, number: int) -> None:
        facts = os.fstat(number)
        found: bytes | dict[str, int]
        if stat.S_ISDIR(facts.st_mode):
            found = {}
            for entry in os.scandir(number):
                place = os.open(entry.name, os.O_RDONLY, dir_fd=number)
                found[entry.name] = os.fstat(place).st_ino
                self._hold(place)
        else:
            again = os.open(f"/proc/self/fd/{number}", os.O_RDONLY)  # may be open for appending only
            found = os.pread(again, facts.st_size, 0)
            self._hold(again)
        self.flushed.append((facts.st_ino, found))

    def _hold(self, number: int) -> None:
        """Keep a file open, so that its inode is not used again."""
        if self._held.setdefault(os.fstat(number).st_ino, number) != number:
            os.close(number)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record each fsync within the context."""

        def fsync(number: Any) -> None:
            descriptor = number if isinstance(number, int) else number.fileno()
            self._fsync(descriptor)
            with self._lock:
                self._record(descriptor)

        os.fsync = fsync  # type: ignore[assignment]  # its own parameter name differs
        try:
            yield
        finally:
            os.fsync = self._fsync

    def after(self, count: int, target: Path) -> Path:
        """Write to ``target`` what is on the disk if the power is cut after ``count`` flushes, and return ``target``."""
        kept = dict(self.flushed[:count])
        folders = {inode for inode, content in self.flushed if isinstance(content, dict)}

        def restore(inode: int, path: Path) -> None:
            content = kept.get(inode, {} if inode in folders else b"")
            if isinstance(content, bytes):
                path.write_bytes(content)
                return
            path.mkdir()
            for name, child in content.items():
                restore(child, path / name)

        target.parent.mkdir(parents=True, exist_ok=True)
        restore(os.stat(self.root).st_ino, target)
        return target

    def close(self) -> None:
        """Release the files that are kept open."""
        for number in self._held.values():
            os.close(number)
        self._held.clear()
