"""Folders, atomic writes of files (under a temporary name, then renamed), and file locks.

What a function has written is on the disk when it returns (:mod:`sedd_graph.store.durable`).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sedd_graph.errors import EnvironmentFault, SeddGraphError, UserError
from sedd_graph.inputs.confine import require_inside
from sedd_graph.store.durable import make_folder, rename

__all__ = [
    "MISSING",
    "alone",
    "as_object",
    "disk_faults",
    "free_name",
    "json_object",
    "numbered",
    "open_to_append",
    "part_folder",
    "plain",
    "read_json",
    "reason_of",
    "remove",
    "subfolder",
    "sweep",
    "write_bytes",
    "write_json",
    "write_text",
]

MISSING = (FileNotFoundError, NotADirectoryError)
"""Exceptions of a file that is not there. Another ``OSError`` says nothing about the file, which may be whole."""
MAX_JSON = 64 * 2**20
"""Size limit of a JSON file, in bytes."""


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
        number, reason = reason_of(error)
        if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            raise UserError(f"{what} could not be written to {path}: {reason}") from error
        if number in (errno.ENOSPC, errno.EDQUOT):
            reason = _full(path)
        message = f"{what} could not be written to {path}: {reason}; earlier files are intact"
        raise EnvironmentFault(message) from error


def _full(path: Path) -> str:
    """Return what the file system of ``path`` has run out of: blocks, or inodes, of which each file takes one."""
    with contextlib.suppress(OSError, AttributeError):  # Windows has no statvfs
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        found = os.statvfs(place)
        if found.f_files and not found.f_favail and found.f_bavail:
            return "the file system has no inodes left (delete files, however small they are)"
    return "the disk is full"


def reason_of(error: Exception) -> tuple[int | None, str]:
    """Return the number and the text of the system's error behind an ``OSError`` or a ``SafetensorError``.

    The number is None if there is none, as for a ``SafetensorError`` about the content of a file.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the number only in its text
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, atomically and durably.

    Args:
        path: The file.
        text: Content of the file.

    Raises:
        UserError: The path is invalid.
        EnvironmentFault: The disk is full, or writing fails for another reason.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, atomically and durably. Raises what :func:`write_text` raises."""
    with disk_faults(path.name, path.parent):
        _sweep_unlocked(path.parent, f".{glob.escape(path.name)}.*.part")
        while True:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            try:
                with temporary.open("wb") as stream:
                    _lock(stream.fileno())
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover, unlocked: again
                    return rename(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def open_to_append(path: Path) -> FileIO:
    """Open a file of a folder for appending, unbuffered, and create it if it does not exist. Opening never blocks.

    Raises:
        UserError: It is a link out of its folder, or not a regular file.
        EnvironmentFault: The disk cannot be written.
    """
    require_inside(path.parent, path.name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if path.exists() and not path.is_file():  # before opening: a pipe without a reader cannot be opened
        raise UserError(f"{path} is not a regular file")
    with disk_faults(path.name, path.parent):
        stream = FileIO(os.open(path, flags, 0o666), "ab")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise UserError(f"{path} is not a regular file")
    return stream


def plain(data: Any) -> Any:
    """Replace numbers that JSON cannot represent by None, such as the standard error of a single value."""
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
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
    write_text(path, json.dumps(plain(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        UserError: The file is missing, not a regular file, larger than 64 MiB or not JSON.
        EnvironmentFault: The file cannot be read for another reason, such as no permission, or no memory.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} is larger than {MAX_JSON >> 20} MiB")
        return json.loads(path.read_text(encoding="utf-8"))
    except MISSING as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def as_object(value: object) -> dict[str, Any]:
    """Return ``value`` if it is a dictionary, else an empty dictionary."""
    return value if isinstance(value, dict) else {}


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in the JSON file at ``path``, or an empty dictionary if the file is missing or invalid."""
    try:
        return as_object(read_json(path))
    except SeddGraphError:
        return {}


def numbered(path: Path) -> Iterator[Path]:
    """Yield ``path`` and its numbered names, as ``samples.zarr``, ``samples-2.zarr``, ... up to 9,999.

    Raises:
        UserError: All names were yielded, so that none of them is free.
    """
    yield path
    for number in range(2, 10_000):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
    raise UserError(f"{path} exists already, and so do its numbered names up to 9,999")


def free_name(path: Path) -> Path:
    """Return the first of the names of :func:`numbered` that does not exist."""
    return next(name for name in numbered(path) if not name.exists())


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
    _sweep_unlocked(path.parent, abandoned or f".{glob.escape(path.name)}.*.part")
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        make_folder(part)
        with _locked(part) as held:
            # another process that sweeps may hold the lock, or have deleted the folder before it was locked here
            if held is not False and part.is_dir():
                try:
                    yield part
                finally:
                    shutil.rmtree(part, ignore_errors=True)
                return


def remove(path: Path) -> None:
    """Delete a file or a folder with all that is in it, if it exists; leave what cannot be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def subfolder(run: Path, name: str) -> Path:
    """Return the path of the folder ``name`` of a run folder, which may not be a link out of the run folder.

    Raises:
        UserError: It is such a link, and ``--allow-outside`` was not given.
    """
    require_inside(run, name)
    return run / name


def sweep(folder: Path, *patterns: str) -> None:
    """Delete what killed processes have left in a folder.

    Args:
        folder: The folder, of which this process is the only writer.
        patterns: Glob patterns of temporary names, such as ``.step-*.part``.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            remove(path)


def _sweep_unlocked(folder: Path, pattern: str) -> None:
    """Delete the temporary files and folders that no process has locked: those that killed processes have left."""
    for left in folder.glob(pattern):
        with _locked(left) as held:
            if held:
                remove(left)


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
def _locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or a folder within the context, whose value is that of :func:`_lock`."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe is opened without a wait
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
        UserError: Another process holds the lock, or ``.lock`` is a link out of the folder or not a regular file.
    """
    with open_to_append(folder / ".lock") as stream:
        if _lock(stream.fileno()) is False:
            raise UserError(f"{folder}: another process is {doing} it")
        yield
