"""JSON Lines files that grow by one record at a time, such as ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sedd_graph.store.durable import sync_folder
from sedd_graph.store.files import disk_faults, open_to_append, plain, write_text

__all__ = ["JsonLines"]


class JsonLines:
    """JSON Lines file, open for appending records. Opening the file removes an incomplete last line.

    Args:
        path: The file, which is created if it does not exist.

    Raises:
        UserError: The file is a link out of its folder, or not a regular file.
        EnvironmentFault: The disk cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._stream = path, open_to_append(path)
        with disk_faults(path.name, path.parent):
            raw = path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            self.torn = whole < len(raw)
            """True if an incomplete last line was removed, such as after a kill or a power cut."""
            if self.torn:
                self._stream.truncate(whole)
            sync_folder(path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append ``record`` as one line, or leave the file unchanged if writing fails. NaN and infinity become null."""
        line = (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with disk_faults(self.path.name, self.path.parent):
            before = os.fstat(self._stream.fileno()).st_size
            try:
                while line:
                    line = line[self._stream.write(line) :]
            except OSError:
                self._stream.truncate(before)
                raise

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> int:
        """Delete the records for which ``wanted(record)`` is false, and all lines that are not JSON objects.

        Returns:
            The number of deleted lines that are not JSON objects; empty lines are not counted.
        """

        def parsed(line: bytes) -> Mapping[str, Any] | None:
            try:
                record = json.loads(line.decode())  # strictly: json itself lets lone surrogates pass
            except (ValueError, RecursionError):
                return None
            return record if isinstance(record, dict) else None

        # split at "\n" only: str.splitlines would also split at U+2028 within a text
        lines = [line for line in self.path.read_bytes().split(b"\n") if line]
        records = [parsed(line) for line in lines]
        kept = [line for line, record in zip(lines, records, strict=True) if record is not None and wanted(record)]
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))
        self._stream.close()
        self._stream = open_to_append(self.path)
        return records.count(None)

    def sync(self) -> None:
        """Flush the appended records to the disk."""
        with disk_faults(self.path.name, self.path.parent):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Flush the appended records to the disk and close the file."""
        try:
            self.sync()
        finally:
            self._stream.close()
