"""Folders and atomic writes of files (under a temporary name, then renamed), and file locks."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sedd_graph.errors import EnvironmentFault, UserError
from sedd_graph.inputs.files import read_json

__all__ = [
    "JsonLines",
    "alone",
    "disk_faults",
    "new_folder",
    "part_folder",
    "read_json",
    "write_json",
    "write_text",
]


@contextmanager
def disk_faults(what: str, path: Path) -> Iterator[None]:
    """Context manager that converts an ``OSError`` or ``SafetensorError`` to an exception of this project.

    Args:
        what: Name of the object being written, for the message.
        path: Path of the object or of its folder, for the message.

    Raises:
        UserError: The path is invalid: too long, or its folder does not exist or is a file.
        EnvironmentFault: The disk is full, or writing fails for another reason.
        FileExistsError: Not converted.
    """
    try:
        yield
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        number, reason = _reason(error)
        if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise UserError(f"{what} could not be written to {path}: {reason}") from error
        if number in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        message = f"{what} could not be written to {path}: {reason}; earlier files are intact"
        raise EnvironmentFault(message) from error


def _reason(error: Exception) -> tuple[int | None, str]:
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the number only in its text
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Args:
        path: The file.
        text: Content of the file.

    Raises:
        UserError: The path is invalid.
        EnvironmentFault: The disk is full, or writing fails for another reason.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with disk_faults(path.name, path.parent):
        try:
            with temporary.open("w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _plain(data: Any) -> Any:
    """Replace numbers that JSON cannot represent by None, such as the standard error of a single value."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file with sorted keys, atomically. NaN and infinity are written as null.

    Args:
        path: The file.
        data: JSON values: mappings, lists, tuples, strings, numbers, booleans and None.

    Raises:
        UserError: The path is invalid.
        EnvironmentFault: The disk is full, or writing fails for another reason.
    """
    write_text(path, json.dumps(_plain(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def new_folder(path: Path) -> Path:
    """Create a new folder ``path``, or ``path-2``, ``path-3``, ... if ``path`` exists, and return the path created."""
    for number in range(1, 10_000):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            with disk_faults("a folder", path.parent):
                candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
    raise UserError(f"{path} exists already, and so do its numbered names up to 9,999")


@contextmanager
def part_folder(path: Path, *, abandoned: str | None = None) -> Iterator[Path]:
    """Context manager that creates a hidden temporary folder beside ``path``.

    The caller fills the folder and renames it to ``path``.

    The folder is locked during the ``with`` block, and deleted after the block unless it was renamed. Unlocked
    temporary folders for the same ``path``, which killed processes have left, are deleted first.

    Args:
        path: The folder to create.
        abandoned: Glob pattern, within the parent of ``path``, of the temporary folders to delete if they are not
            locked; None for those of the same ``path``.
    """
    for left in path.parent.glob(abandoned or f".{glob.escape(path.name)}.*.part"):
        with _locked(left) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        part.mkdir(parents=True)
        with _locked(part) as held:
            if held is None or part.is_dir():  # another process may have deleted it before it was locked
                try:
                    yield part
                finally:
                    shutil.rmtree(part, ignore_errors=True)
                return


def _lock(number: int) -> bool | None:
    """Try to lock an open file or folder. Return whether that succeeded; None where locks are not supported."""
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows; a network file system without locks
        return None
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder within the context, whose value is that of :func:`_lock`."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows; or it was deleted
        yield None
        return
    try:
        yield _lock(number)
    finally:
        os.close(number)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Context manager that locks ``folder`` against other processes during the ``with`` block.

    The operating system releases the lock when the process ends. Without support for file locks, nothing is locked.

    Args:
        folder: The folder, in which the file ``.lock`` is created.
        doing: Action of this process as a participle, such as "training", for the message.

    Raises:
        UserError: Another process holds the lock.
    """
    with disk_faults(".lock", folder):
        stream = (folder / ".lock").open("ab")
    with stream:
        if _lock(stream.fileno()) is False:
            raise UserError(f"{folder}: another process is {doing} it")
        yield


class JsonLines:
    """JSON Lines file, open for appending records. Opening the file removes an incomplete last line.

    Args:
        path: The file, which is created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_faults(path.name, path.parent):
            self._stream = path.open("ab", buffering=0)
            raw = path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            if whole < len(raw):
                self._stream.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` as one line, or leave the file unchanged if writing fails. NaN and infinity become null."""
        line = (json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with disk_faults(self.path.name, self.path.parent):
            before = os.fstat(self._stream.fileno()).st_size
            try:
                while line:
                    line = line[self._stream.write(line) :]
            except OSError:
                self._stream.truncate(before)
                raise

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Delete the records for which ``wanted(record)`` is false, and all lines that are not JSON objects."""

        def is_wanted(line: bytes) -> bool:
            try:
                record = json.loads(line)
            except ValueError:
                return False
            return isinstance(record, dict) and wanted(record)

        # split at "\n" only: str.splitlines would also split at U+2028 within a text
        kept = [line for line in self.path.read_bytes().split(b"\n") if is_wanted(line)]
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))
        self._stream.close()
        with disk_faults(self.path.name, self.path.parent):
            self._stream = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file. Appended records need no flush, since writes are not buffered."""
        self._stream.close()
