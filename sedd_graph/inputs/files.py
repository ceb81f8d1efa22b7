"""Reading of untrusted files: regular files only, never more bytes than a limit, and whole text as UTF-8 or JSON.

A path from a blueprint, run folder or command line can lead to a pipe that never delivers, a device that never ends, or
a file that grows while it is read. Everything that opens such a path uses these functions. Libraries that open a path
themselves (safetensors, Parquet) are preceded by :func:`require_file`.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from sedd_graph.errors import UserError

__all__ = ["MAX_JSON", "open_file", "read_bytes", "read_json", "read_text", "require_file", "size_text"]

MAX_JSON = 256 * 2**20
"""Default size limit of a JSON file, in bytes."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def size_text(size: int) -> str:
    """Return a number of bytes as text for the user, such as ``64 MiB``."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.4g} {unit}"
    return f"{size} bytes"


def require_file(path: str | Path, *, limit: int) -> os.stat_result:
    """Check that a path leads to a regular file of at most ``limit`` bytes, and return its ``os.stat`` result.

    Args:
        path: The file; links are followed.
        limit: Largest accepted size in bytes.

    Raises:
        UserError: The file does not exist or cannot be reached, is a folder, pipe, device or socket, or is too large.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    _check(path, found, limit)
    return found


def _unreadable(path: str | Path, error: OSError | ValueError) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"{path}: cannot be read: {reason}")


def _check(path: str | Path, found: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        raise UserError(f"{path}: cannot be read: it is {kind}, and a regular file is needed")
    if found.st_size > limit:
        raise UserError(f"{path}: has {size_text(found.st_size)}; the limit is {size_text(limit)}")


def open_file(path: str | Path, *, limit: int) -> BinaryIO:
    """Open a regular file for reading. Opening never blocks, whatever lies at the path.

    The file may grow afterwards: read at most ``limit`` bytes from it.

    Args:
        path: The file; links are followed.
        limit: Largest accepted size in bytes.

    Raises:
        UserError: As for :func:`require_file`, or the file cannot be opened.
    """
    require_file(path, limit=limit)  # before opening: opening a device can have effects
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        _check(path, os.fstat(number), limit)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str | Path, *, limit: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.

    Raises:
        UserError: The file is not a regular one, is too large, or cannot be read.
    """
    try:
        with open_file(path, limit=limit) as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if raw is None or len(raw) > limit:  # None: nothing to read now, in a file that the kernel makes up
        raise UserError(f"{path}: has more than {size_text(limit)}, which is the limit")
    return raw


def read_text(path: str | Path, *, limit: int) -> str:
    """Return the content of a UTF-8 text file.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.

    Raises:
        UserError: The file is not a regular one, is too large, cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None


def read_json(path: str | Path, *, limit: int = MAX_JSON) -> Any:
    """Return the content of a JSON file.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.

    Raises:
        UserError: The file is not a regular one, is too large, cannot be read, or is not JSON.
    """
    text = read_text(path, limit=limit)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not JSON: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
