"""Run folders and whole files: written under a temporary name, then renamed; nothing is ever overwritten."""

from __future__ import annotations

import datetime
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

__all__ = [
    "JsonLines",
    "alone",
    "disk_faults",
    "new_folder",
    "new_run",
    "part_folder",
    "read_json",
    "write_json",
    "write_text",
]


@contextmanager
def disk_faults(what: str, path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a sentence: an :class:`EnvironmentFault`, or a :class:`UserError` where there
    can be no such path. A :class:`FileExistsError` is passed on."""
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
        raise EnvironmentFault(
            f"{what} could not be written to {path}: {reason}; what was written before is whole"
        ) from error


def _reason(error: Exception) -> tuple[int | None, str]:
    if isinstance(error, OSError):
        return error.errno, error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the number in its text alone
    return (int(found[1]), os.strerror(int(found[1]))) if found else (None, str(error))


def write_text(path: Path, text: str) -> None:
    """Write a whole file at once: temporary name, flush to disk, rename."""
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
    """The same with null for numbers that JSON cannot hold, such as the standard error of a single value."""
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_json(path: Path, data: Any) -> None:
    """JSON with sorted keys, for people and programs. NaN and infinities become null."""
    write_text(path, json.dumps(_plain(data), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises :class:`UserError` where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def new_folder(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3``, ... where that exists already. The folder is made."""
    for number in range(1, 10_000):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            with disk_faults("a folder", path.parent):
                candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue
    raise UserError(f"{path} and 9,999 numbered neighbours exist already")


def new_run(root: Path, name: str, digest: str) -> Path:
    """``root/name/<utc-stamp>-<digest>``, made now, never one that was there."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return new_folder(root / name / f"{stamp}-{digest[:8]}")


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, to be filled and renamed; it is removed where the block leaves it behind.

    It is locked while the block runs, so what a process that was killed has left of ``path`` is known by having no lock,
    and is removed first.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with _locked(left) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        part.mkdir(parents=True)
        with _locked(part) as held:
            if held is None or part.is_dir():  # another process may have cleaned up between the two
                try:
                    yield part
                finally:
                    shutil.rmtree(part, ignore_errors=True)
                return


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Try to lock a folder itself: whether that worked, or None where folders cannot be locked."""
    try:
        import fcntl

        number = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; or it is gone already
        yield None
        return
    try:
        held: bool | None = True
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:  # a network file system without locks
            held = None
        yield held
    finally:
        os.close(number)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Hold ``folder`` while the block runs; the system lets go of it when a process dies, however that may be.

    Raises :class:`UserError` where another process holds it. Does nothing where files cannot be locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with disk_faults(".lock", folder):
        stream = (folder / ".lock").open("ab")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is {doing} it") from None
        except OSError:  # a network file system without locks
            pass
        yield


class JsonLines:
    """Appends whole lines. A last line torn by a kill is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_faults(path.name, path.parent):
            self._stream = path.open("ab", buffering=0)
            raw = path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            if whole < len(raw):
                self._stream.truncate(whole)

    def append(self, record: Mapping[str, Any]) -> None:
        """One record, in the file as a whole line or not at all. NaN and infinities become null."""
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
        """Rewrite the file with the records that are wanted; lines that are no records go as well."""

        def stays(line: bytes) -> bool:
            try:
                record = json.loads(line)
            except ValueError:
                return False
            return isinstance(record, dict) and wanted(record)

        # split at "\n" alone: a text may hold U+2028, at which str.splitlines splits too
        kept = [line for line in self.path.read_bytes().split(b"\n") if stays(line)]
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))
        self._stream.close()
        with disk_faults(self.path.name, self.path.parent):
            self._stream = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """What was appended is in the file already."""
        self._stream.close()
