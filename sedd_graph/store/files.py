"""Run folders and whole files: written under a temporary name, then renamed; nothing is ever overwritten."""

from __future__ import annotations

import datetime
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sedd_graph.errors import EnvironmentFault, UserError

__all__ = ["JsonLines", "disk_faults", "new_folder", "new_run", "read_json", "write_json", "write_text"]


@contextmanager
def disk_faults(what: str, path: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentFault(
                f"the disk is full: {what} could not be written to {path}; what was written before is whole"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise EnvironmentFault(f"{what} could not be written to {path}: {error.strerror}") from error
        raise


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


class JsonLines:
    """Appends whole lines. A last line torn by a kill is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_faults(path.name, path.parent):
            if path.exists():
                raw = path.read_bytes()
                whole = raw.rfind(b"\n") + 1
                if whole < len(raw):
                    with path.open("r+b") as stream:
                        stream.truncate(whole)
            self._stream = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """One record, on disk when this returns. NaN and infinities become null."""
        with disk_faults(self.path.name, self.path.parent):
            self._stream.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
            self._stream.flush()

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
        self._stream = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._stream.close()
